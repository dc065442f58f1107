"""Components and spanning trees against plain references."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.alignment.edges import EdgeSet, components, make_edges, spanning_tree
from mast3r_sfm.types import Int32
from tests.exact import ring


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, Int32]:
    """A number of images and unique pairs i < j."""
    count = draw(st.integers(1, 12))
    possible = [(i, j) for i in range(count) for j in range(i + 1, count)]
    chosen = draw(st.sets(st.sampled_from(possible))) if possible else set()
    return count, np.array(sorted(chosen), np.int32).reshape(-1, 2)


@st.composite
def connected(draw: st.DrawFn) -> EdgeSet:
    count, pairs = draw(graphs().filter(lambda graph: graph[0] > 1))
    # Each image is tied to an earlier one as well.
    chain = [(draw(st.integers(0, child - 1)), child) for child in range(1, count)]
    unique = np.array(sorted({*map(tuple, pairs.tolist()), *chain}), np.int32)
    weight = np.array(draw(st.lists(st.floats(0.01, 500.0), min_size=len(unique), max_size=len(unique))))
    return edge_set(count, unique, weight)


def edge_set(count: int, pairs: Int32, weight: np.ndarray) -> EdgeSet:
    return EdgeSet(
        num_images=count,
        pairs=pairs,
        rotation=np.tile(np.eye(3), (len(pairs), 1, 1)),
        translation=np.zeros((len(pairs), 3)),
        weight=weight,
    )


def plain_components(count: int, pairs: Int32) -> list[set[int]]:
    """Merge the sets of both ends of every pair."""
    part = {image: {image} for image in range(count)}
    for i, j in pairs.tolist():
        merged = part[i] | part[j]
        for image in merged:
            part[image] = merged
    unique = {min(images): images for images in part.values()}
    return sorted(unique.values(), key=lambda images: (-len(images), min(images)))


def plain_largest_weight(edges: EdgeSet) -> float:
    """Kruskal's algorithm: the heaviest edges that close no ring."""
    part, total = list(range(edges.num_images)), 0.0
    for edge in np.argsort(-edges.weight, kind="stable"):
        i, j = (part[image] for image in edges.pairs[edge])
        if i != j:
            total += edges.weight[edge]
            part = [i if other == j else other for other in part]
    return total


@given(graphs())
def test_components_are_the_plain_ones(graph: tuple[int, Int32]) -> None:
    found = components(*graph)
    assert [set(part.tolist()) for part in found] == plain_components(*graph)
    for part in found:
        assert (np.diff(part) > 0).all()


@given(connected())
def test_the_tree_reaches_every_image_once_from_a_reached_one(edges: EdgeSet) -> None:
    reached: set[int] = set()
    for parent, child, edge in spanning_tree(edges):
        if not reached:
            reached.add(parent)
        assert parent in reached
        assert child not in reached
        assert sorted((parent, child)) == edges.pairs[edge].tolist()
        reached.add(child)
    assert reached == set(range(edges.num_images))


@given(connected())
def test_no_tree_weighs_more(edges: EdgeSet) -> None:
    total = sum(edges.weight[edge] for _, _, edge in spanning_tree(edges))
    assert abs(total - plain_largest_weight(edges)) <= 1e-9 * max(1.0, total)


@given(connected())
def test_the_tree_starts_where_most_evidence_is(edges: EdgeSet) -> None:
    evidence = np.zeros(edges.num_images)
    for pair, weight in zip(edges.pairs, edges.weight, strict=True):
        evidence[pair] += weight
    root = spanning_tree(edges)[0][0]
    assert evidence[root] >= evidence.max() * (1 - 1e-12)


def test_edges_are_numbered_by_the_images_of_their_part() -> None:
    scene = ring(6)
    matches = [scene.matches(1, 3, scale=2.0), scene.matches(3, 5)]
    edges = make_edges(matches, np.array([1, 3, 5], np.int32))
    np.testing.assert_array_equal(edges.pairs, [[0, 1], [1, 2]])
    np.testing.assert_array_equal(edges.translation[0], matches[0].second_from_first[:, 3])
    np.testing.assert_array_equal(edges.rotation[1], matches[1].second_from_first[:, :3])
    np.testing.assert_allclose(edges.weight, [len(matches[0]) * 0.81, len(matches[1]) * 0.81])
