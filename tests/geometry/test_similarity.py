from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.geometry.similarity import Similarity, align_similarity, align_similarity_robust, spanned_dimensions

seeds = st.integers(0, 2**32 - 1)


def random_similarity(generator: np.random.Generator) -> Similarity:
    return Similarity(
        scale=float(np.exp(generator.uniform(-5, 5))),
        rotation=Rotation.random(rng=generator).as_matrix(),
        translation=generator.normal(size=3) * 10,
    )


def assert_same(first: Similarity, second: Similarity, tolerance: float = 1e-9) -> None:
    assert first.scale == pytest.approx(second.scale, rel=tolerance)
    np.testing.assert_allclose(first.rotation, second.rotation, atol=tolerance)
    size = max(1.0, first.scale, float(np.abs(second.translation).max()))
    np.testing.assert_allclose(first.translation, second.translation, atol=tolerance * size)


def loss(similarity: Similarity, source: np.ndarray, target: np.ndarray) -> float:
    return float(((similarity.apply(source) - target) ** 2).sum())


class TestSimilarity:
    @given(seeds)
    def test_inverse_and_composition(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        first, second = random_similarity(generator), random_similarity(generator)
        points = generator.normal(size=(7, 3))
        np.testing.assert_allclose(second.after(first).apply(points), second.apply(first.apply(points)), rtol=1e-9)
        np.testing.assert_allclose(first.inverse().apply(first.apply(points)), points, atol=1e-10)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_scale_must_be_positive(self, scale: float) -> None:
        with pytest.raises(ShapeError, match="scale"):
            Similarity(scale=scale, rotation=np.eye(3), translation=np.zeros(3))

    def test_shapes_and_values(self) -> None:
        with pytest.raises(ShapeError, match=r"\(2, 3\)"):
            Similarity(scale=1.0, rotation=np.eye(3)[:2], translation=np.zeros(3))
        with pytest.raises(ShapeError, match="NaN"):
            Similarity(scale=1.0, rotation=np.eye(3), translation=np.array([0, np.nan, 0]))


class TestAlignment:
    @given(seeds, st.integers(4, 40))
    def test_recovers_a_random_similarity(self, seed: int, count: int) -> None:
        generator = np.random.default_rng(seed)
        truth = random_similarity(generator)
        source = generator.normal(size=(count, 3))
        assert_same(align_similarity(source, truth.apply(source)), truth)

    @given(seeds)
    def test_recovers_from_points_on_a_plane(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        truth = random_similarity(generator)
        source = generator.normal(size=(6, 2)) @ generator.normal(size=(2, 3))
        # A thin sheet of points fixes the rotation less well than a cloud.
        assert_same(align_similarity(source, truth.apply(source)), truth, 1e-6)

    @given(seeds)
    def test_is_equivariant(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        source = generator.normal(size=(9, 3))
        target = source + 0.1 * generator.normal(size=(9, 3))
        moved = random_similarity(generator)
        plain = align_similarity(source, target)
        assert_same(align_similarity(source, moved.apply(target)), moved.after(plain))
        assert_same(align_similarity(moved.apply(source), target), plain.after(moved.inverse()))

    @given(seeds)
    def test_no_similarity_nearby_fits_better(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        source, target = generator.normal(size=(2, 8, 3))
        best = align_similarity(source, target)
        least = loss(best, source, target)
        for _ in range(20):
            turn = Rotation.from_rotvec(generator.normal(scale=1e-2, size=3)).as_matrix()
            other = Similarity(
                scale=best.scale * (1 + generator.normal(scale=1e-2)),
                rotation=turn @ best.rotation,
                translation=best.translation + generator.normal(scale=1e-2, size=3),
            )
            assert loss(other, source, target) > least

    @given(seeds)
    def test_never_a_reflection(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        source = generator.normal(size=(8, 3))
        found = align_similarity(source, source * [1, 1, -1])
        assert np.linalg.det(found.rotation) == pytest.approx(1.0)
        assert loss(found, source, source * [1, 1, -1]) > 1e-3

    def test_refuses_what_fixes_nothing(self) -> None:
        cloud = np.random.default_rng(0).normal(size=(5, 3))
        line = np.linspace(0, 1, 5)[:, None] * [1.0, 2.0, 3.0] + 7.0
        with pytest.raises(ShapeError, match="at least three"):
            align_similarity(cloud[:2], cloud[:2])
        with pytest.raises(ShapeError, match="both be"):
            align_similarity(cloud, cloud[:4])
        with pytest.raises(ShapeError, match="NaN"):
            align_similarity(cloud, np.full((5, 3), np.nan))
        with pytest.raises(ShapeError, match="target points lie on one line"):
            align_similarity(cloud, line)
        with pytest.raises(ShapeError, match="source points coincide"):
            align_similarity(np.ones((5, 3)), cloud, collinear_ok=True)

    def test_points_on_a_line_where_allowed(self) -> None:
        line = np.linspace(0, 1, 5)[:, None] * [1.0, 2.0, 3.0] + 7.0
        truth = random_similarity(np.random.default_rng(1))
        found = align_similarity(line, truth.apply(line), collinear_ok=True)
        assert found.scale == pytest.approx(truth.scale)
        np.testing.assert_allclose(found.apply(line), truth.apply(line), rtol=1e-9)


@pytest.mark.parametrize(
    ("points", "dimensions"),
    [
        (np.zeros((0, 3)), 0),
        (np.full((4, 3), 1e6), 0),
        (np.outer([0, 1, 3], [0.1, 0.2, 0.3]) + 1e3, 1),
        (np.array([[0, 0, 5], [1, 0, 5], [0, 1, 5.0]]), 2),
        (np.vstack([np.zeros(3), np.eye(3) * 1e-9]), 3),
    ],
)
def test_spanned_dimensions(points: np.ndarray, dimensions: int) -> None:
    assert spanned_dimensions(points) == dimensions


class TestRobustAlignment:
    @given(seeds, st.integers(0, 9))
    def test_ignores_outliers(self, seed: int, wrong: int) -> None:
        generator = np.random.default_rng(seed)
        truth = random_similarity(generator)
        source = generator.normal(size=(20, 3))
        target = truth.apply(source)
        target[:wrong] += truth.scale * generator.normal(scale=30, size=(wrong, 3))
        found, inliers = align_similarity_robust(source, target)
        assert_same(found, truth, 1e-8)
        assert inliers.tolist() == [False] * wrong + [True] * (20 - wrong)

    def test_with_noise_stays_near_the_truth_and_keeps_most_points(self) -> None:
        generator = np.random.default_rng(3)
        truth = random_similarity(generator)
        source = generator.normal(size=(60, 3))
        target = truth.apply(source + generator.normal(scale=0.01, size=(60, 3)))
        target[:20] = truth.apply(source[:20] + 3.0)
        found, inliers = align_similarity_robust(source, target)
        errors = np.linalg.norm(found.apply(source) - truth.apply(source), axis=1) / truth.scale
        assert 0 < errors.max() < 0.02
        assert not inliers[:20].any()
        assert inliers[20:].mean() > 0.9
        plain = align_similarity(source, target)
        assert np.linalg.norm(plain.apply(source) - truth.apply(source), axis=1).max() / truth.scale > 0.5

    def test_same_seed_same_result(self) -> None:
        source, target = np.random.default_rng(5).normal(size=(2, 12, 3))
        first, chosen = align_similarity_robust(source, target, seed=1)
        again, chosen_again = align_similarity_robust(source, target, seed=1)
        assert first.scale == again.scale
        np.testing.assert_array_equal(first.rotation, again.rotation)
        np.testing.assert_array_equal(chosen, chosen_again)

    def test_few_points_are_all_used(self) -> None:
        source, target = np.random.default_rng(6).normal(size=(2, 4, 3))
        found, inliers = align_similarity_robust(source, target)
        assert inliers.all()
        assert_same(found, align_similarity(source, target))

    @given(seeds)
    def test_a_line_with_outliers(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        truth = random_similarity(generator)
        source = np.linspace(0, 9, 12)[:, None] * generator.normal(size=3) + generator.normal(size=3)
        target = truth.apply(source)
        target[3] += 50 * truth.scale
        found, inliers = align_similarity_robust(source, target)
        assert np.flatnonzero(~inliers).tolist() == [3]
        np.testing.assert_allclose(found.apply(source)[4:], target[4:], atol=1e-7 * truth.scale)

    @given(seeds, st.integers(3, 9))
    def test_a_camera_that_stands_still_for_most_of_the_time(self, seed: int, still: int) -> None:
        generator = np.random.default_rng(seed)
        truth = random_similarity(generator)
        source = generator.normal(size=(12, 3))
        source[:still] = source[0] + generator.normal(scale=1e-3, size=(still, 3)) * (seed % 2)
        noise = generator.normal(scale=1e-3, size=(12, 3))
        found, inliers = align_similarity_robust(source, truth.apply(source + noise))
        assert inliers.sum() >= 6
        errors = np.linalg.norm(found.apply(source) - truth.apply(source), axis=1) / truth.scale
        assert 0 < np.median(errors) < 0.01

    def test_points_that_agree_in_one_place_only(self) -> None:
        # Sizes from nothing to a thousand, far from the origin: what agrees may coincide up to rounding.
        for seed in (260, 320, 485):
            generator = np.random.default_rng(seed)
            count = int(generator.integers(5, 12))
            sizes = [0, 1e-12, 1e-3, 1, 1e3]
            source = generator.normal(size=(count, 3)) * generator.choice(sizes, size=(count, 1))
            target = 1e6 + generator.normal(size=(count, 3)) * generator.choice(sizes, size=(count, 1))
            found, inliers = align_similarity_robust(source, target)
            assert inliers.sum() >= count / 2
            assert np.median(np.linalg.norm(found.apply(source) - target, axis=1)) < 1e3

    def test_most_points_in_one_place(self) -> None:
        source = np.vstack([np.zeros((6, 3)), np.eye(3), 2 * np.eye(3)])
        truth = random_similarity(np.random.default_rng(8))
        found, inliers = align_similarity_robust(source, truth.apply(source))
        assert inliers.all()
        assert_same(found, truth)
