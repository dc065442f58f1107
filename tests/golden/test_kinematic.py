"""Parity with the reference's kinematic chains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.alignment.tree import KinematicTree, TreeKind, kinematic_trees, saturating_score

NAMES = ("n2", "n3", "n6_full", "n10_sparse", "n16", "n24_sat", "chain8", "n40", "disconnected6")
STORED = {"mst": TreeKind.MAXIMUM, "ward": TreeKind.WARD, "average": TreeKind.AVERAGE, "single": TreeKind.SINGLE}


def _trees(golden_dir: Path, name: str, kind: TreeKind) -> list[KinematicTree]:
    with np.load(golden_dir / "kinematic.npz") as file:
        matrix = file[f"{name}/pairwise_scores"].astype(np.float64)
        cells = float(file[f"{name}/imsizes_WH"].prod(axis=1).mean() / int(file[f"{name}/subsample"]) ** 2)
    pairs = np.argwhere(np.triu(matrix) > 0).astype(np.int32)
    return kinematic_trees(pairs, matrix[pairs[:, 0], pairs[:, 1]], len(matrix), kind, saturating_score(cells))


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("stored", STORED)
def test_trees_are_the_reference_s(golden_dir: Path, name: str, stored: str) -> None:
    (tree,) = _trees(golden_dir, name, STORED[stored])
    with np.load(golden_dir / "kinematic.npz") as file:
        assert tree.root == int(file[f"{name}/{stored}/root"])
        np.testing.assert_array_equal(tree.edges, file[f"{name}/{stored}/edges_parent_child"])


@pytest.mark.parametrize("kind", TreeKind)
def test_parts_get_a_tree_each_where_the_reference_gives_half_of_one_or_joins_what_shares_nothing(
    golden_dir: Path, kind: TreeKind
) -> None:
    trees = _trees(golden_dir, "disconnected6", kind)
    assert [sorted({tree.root, *tree.edges.ravel().tolist()}) for tree in trees] == [[0, 1, 2], [3, 4, 5]]
    if kind is TreeKind.MAXIMUM:
        with np.load(golden_dir / "kinematic.npz") as file:
            assert trees[0].root == int(file["disconnected6/mst/root"])
            np.testing.assert_array_equal(trees[0].edges, file["disconnected6/mst/edges_parent_child"])
