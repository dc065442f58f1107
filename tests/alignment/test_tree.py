"""Kinematic trees over any graph."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mast3r_sfm.alignment.edges import components
from mast3r_sfm.alignment.tree import TreeKind, kinematic_trees, saturating_score
from mast3r_sfm.errors import ShapeError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**16), st.sampled_from(TreeKind))
def test_every_connected_part_gets_one_whole_tree(count: int, seed: int, kind: TreeKind) -> None:
    rng = np.random.default_rng(seed)
    pairs = np.argwhere(np.triu(rng.random((count, count)) < 0.3, 1)).astype(np.int32)
    scores = rng.uniform(1, 500, len(pairs))
    trees = kinematic_trees(pairs, scores, count, kind, saturating_score(100.0))
    parts = components(count, pairs)
    assert len(trees) == len(parts)
    for tree, part in zip(trees, parts, strict=True):
        assert len(tree.edges) == len(part) - 1
        reached = {tree.root}
        for parent, child in tree.edges.tolist():
            assert parent in reached
            assert child not in reached
            reached.add(child)
        assert reached == set(part.tolist())
    if kind is TreeKind.MAXIMUM:
        known = {tuple(pair) for pair in pairs.tolist()}
        assert all((min(edge), max(edge)) in known for tree in trees for edge in tree.edges.tolist())


def test_the_maximum_tree_has_the_largest_score() -> None:
    pairs = np.array([[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]], np.int32)
    (tree,) = kinematic_trees(pairs, np.array([5.0, 9.0, 7.0, 1.0, 2.0]), 4, TreeKind.MAXIMUM, 100.0)
    assert {tuple(sorted(edge)) for edge in tree.edges.tolist()} == {(0, 2), (1, 2), (2, 3)}


@pytest.mark.parametrize("score", [0.0, -1.0, np.nan, np.inf])
def test_scores_must_be_positive(score: float) -> None:
    with pytest.raises(ShapeError, match="positive and finite"):
        kinematic_trees(np.array([[0, 1]], np.int32), np.array([score]), 2, TreeKind.WARD, 100.0)
