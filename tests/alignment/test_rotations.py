"""Rotation averaging, and what triangles say of edges."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mast3r_sfm.alignment.edges import EdgeSet, make_edges
from mast3r_sfm.alignment.rotations import UNTESTED_TRUST, average_rotations, graph_laplacian, trust_by_triangles
from mast3r_sfm.geometry.rigid import angle_between_rotations, rotation_from_axis_angle
from mast3r_sfm.types import Float64
from tests.exact import Scene, ring


def all_edges(scene: Scene) -> EdgeSet:
    number = len(scene.poses)
    matches = [scene.matches(i, j) for i, j in combinations(range(number), 2)]
    return make_edges(matches, np.arange(number, dtype=np.int32))


def disturbed(edges: EdgeSet, angle_deg: float, seed: int) -> EdgeSet:
    """Every edge turned by about this angle."""
    vectors = np.random.default_rng(seed).normal(0, np.radians(angle_deg) / np.sqrt(3), (len(edges.pairs), 3))
    return replace(edges, rotation=rotation_from_axis_angle(vectors) @ edges.rotation)


def spoiled(edges: EdgeSet, wrong: np.ndarray, seed: int = 0) -> EdgeSet:
    """Edges `wrong` turned by an arbitrary large angle."""
    rng = np.random.default_rng(seed)
    axes = rng.normal(size=(len(edges.pairs), 3))
    turns = rotation_from_axis_angle(
        axes / np.linalg.norm(axes, axis=1)[:, None] * rng.uniform(0.7, 3.1, len(axes))[:, None]
    )
    return replace(edges, rotation=np.where(wrong[:, None, None], turns @ edges.rotation, edges.rotation))


def worst_error_deg(rotations: Float64, scene: Scene) -> float:
    """Largest error over all pairs; the frame is free."""
    first, second = np.array(list(combinations(range(len(rotations)), 2))).T
    truth = scene.poses[:, :, :3]
    found = rotations[second] @ rotations[first].transpose(0, 2, 1)
    true = truth[second] @ truth[first].transpose(0, 2, 1)
    return float(np.degrees(angle_between_rotations(found, true)).max())


@pytest.mark.parametrize("number", [2, 3, 9])
def test_exact_edges_give_exact_rotations(number: int) -> None:
    scene = ring(number)
    rotations, error = average_rotations(all_edges(scene))
    assert worst_error_deg(rotations, scene) < 1e-7
    assert error.max() < 1e-9
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(3), (number, 1, 1)), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)


@pytest.mark.parametrize("seed", range(4))
def test_averaging_is_better_than_its_edges(seed: int) -> None:
    scene = ring(12, seed=seed)
    edges = disturbed(all_edges(scene), 1.0, seed)
    rotations, error = average_rotations(edges)
    assert 0.01 < worst_error_deg(rotations, scene) < 1.2
    assert 0.3 < np.degrees(np.median(error)) < 1.5  # the edges' own noise


@pytest.mark.parametrize("seed", range(6))
def test_a_fifth_of_nonsense_is_seen_through(seed: int) -> None:
    scene = ring(12, seed=seed)
    edges = all_edges(scene)
    wrong = np.random.default_rng([seed, 1]).random(len(edges.pairs)) < 0.2
    spoilt = spoiled(disturbed(edges, 0.5, seed), wrong, seed)
    trusted = replace(spoilt, weight=spoilt.weight * trust_by_triangles(spoilt))
    rotations, error = average_rotations(trusted)
    assert worst_error_deg(rotations, scene) < 1.5
    assert wrong.sum() >= 5
    assert np.degrees(error[wrong]).min() > 20
    assert np.degrees(error[~wrong]).max() < 5


def test_triangles_tell_wrong_edges_from_right_ones() -> None:
    edges = all_edges(ring(8))
    assert trust_by_triangles(edges) == pytest.approx(np.ones(28))
    wrong = np.zeros(28, bool)
    wrong[[3, 11, 20]] = True
    trust = trust_by_triangles(spoiled(edges, wrong))
    assert trust[wrong].max() < 0.1
    assert trust[~wrong].min() > 0.5
    assert (trust > 0).all()


def test_an_edge_in_no_triangle_is_half_trusted() -> None:
    scene = ring(5)
    pairs = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4)]
    edges = make_edges([scene.matches(*pair) for pair in pairs], np.arange(5, dtype=np.int32))
    trust = trust_by_triangles(edges)
    np.testing.assert_allclose(trust, [1, 1, 1, UNTESTED_TRUST, UNTESTED_TRUST])
    refuted = trust_by_triangles(spoiled(edges, np.array([True, False, False, False, False])))
    assert refuted[:3].max() < UNTESTED_TRUST
    chain = replace(
        edges,
        **{name: np.delete(getattr(edges, name), 2, axis=0) for name in ("pairs", "rotation", "translation", "weight")},
    )
    np.testing.assert_array_equal(trust_by_triangles(chain), UNTESTED_TRUST)


def test_weights_decide_between_contradicting_edges() -> None:
    scene = ring(3)
    edges = all_edges(scene)
    bent = spoiled(edges, np.array([False, True, False]))
    rotations, error = average_rotations(replace(bent, weight=np.array([100.0, 1.0, 100.0])))
    assert worst_error_deg(rotations, scene) < 0.1
    assert error.argmax() == 1


def test_the_laplacian_is_that_of_the_graph() -> None:
    edges = replace(all_edges(ring(4)), weight=np.ones(6))
    weight = np.arange(1.0, 7.0)
    incidence = np.zeros((6, 4))
    incidence[np.arange(6), edges.pairs[:, 0]] = -1
    incidence[np.arange(6), edges.pairs[:, 1]] = 1
    expected = incidence.T @ np.diag(weight) @ incidence
    np.testing.assert_allclose(graph_laplacian(edges, weight).toarray(), expected)
