"""The picture of the pairs stage: what it shows can be found in its pixels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from mast3r_sfm.retrieval.graph import exhaustive_graph, graph_of_pairs, union
from mast3r_sfm.retrieval.picture import PANEL_PX, draw_pairs, layout
from mast3r_sfm.retrieval.stage import ChosenPairs
from mast3r_sfm.types import Float32, Reason, ViewGraph

BRIDGE_COLOUR = (214, 39, 40)


def two_groups(count: int) -> Float32:
    group = np.arange(count) * 2 // count
    similarity = np.where(group[:, None] == group, 0.5, 0.01).astype(np.float32)
    np.fill_diagonal(similarity, 1)
    return similarity


def chosen(similarity: Float32, graph: ViewGraph) -> ChosenPairs:
    return ChosenPairs(graph=graph, reserve=graph, similarity=similarity)


def ring(count: int) -> ViewGraph:
    pairs = np.array([(image, (image + 1) % count) for image in range(count)], np.int64)
    return graph_of_pairs(np.eye(count, dtype=np.float32), pairs, Reason.SEQUENCE)


def test_a_ring_is_laid_out_as_a_ring() -> None:
    places = layout(ring(40))
    assert places.min() >= 0
    assert places.max() <= 1
    steps = np.linalg.norm(np.roll(places, -1, axis=0) - places, axis=1)
    across = np.linalg.norm(places[20:] - places[:20], axis=1)
    assert across.min() > 3 * steps.max()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 300])
def test_every_image_has_a_place_of_its_own(count: int) -> None:
    similarity = np.eye(count, dtype=np.float32)
    for graph in (exhaustive_graph(similarity), graph_of_pairs(similarity, np.zeros((0, 2), np.int64), Reason.USER)):
        places = layout(graph)
        assert places.shape == (count, 2)
        assert np.isfinite(places).all()
        assert count < 2 or pdist(places).min() > 1e-4


def test_the_matrix_shows_the_groups_and_the_graph_its_bridge() -> None:
    similarity = two_groups(20)
    inside = [(i, j) for i in range(20) for j in range(i + 1, 20) if i // 10 == j // 10]
    graph = graph_of_pairs(similarity, np.array(inside), Reason.NEIGHBOUR)
    bridged = union([graph, graph_of_pairs(similarity, np.array([(3, 15)]), Reason.BRIDGE)])
    plain, with_bridge = (np.asarray(draw_pairs(chosen(similarity, one))).astype(int) for one in (graph, bridged))
    matrix = plain[40 : 40 + PANEL_PX, 40 : 40 + PANEL_PX].sum(axis=2)
    cell = PANEL_PX // 20
    centres = matrix[cell // 2 :: cell, cell // 2 :: cell]
    group = np.arange(20) // 10
    same = group[:, None] == group
    off_diagonal = ~np.eye(20, dtype=bool)
    assert centres[same & off_diagonal].min() > 2 * centres[~same].max()

    def red(picture: np.ndarray) -> int:
        return int((np.abs(picture[:, 940:] - BRIDGE_COLOUR).sum(axis=2) < 30).sum())

    assert red(plain) == 0
    assert red(with_bridge) > 200


def test_many_images_fit_into_the_picture() -> None:
    similarity = two_groups(2 * PANEL_PX + 7)
    picture = draw_pairs(chosen(similarity, ring(len(similarity))))
    assert picture.size == draw_pairs(chosen(two_groups(4), ring(4))).size
    matrix = np.asarray(picture).astype(int)[40 : 40 + PANEL_PX, 40 : 40 + PANEL_PX].sum(axis=2)
    assert matrix[:400, :400].min() > 2 * matrix[:400, 500:].max()
