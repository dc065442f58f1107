from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mast3r_sfm.errors import InputError, ShapeError
from mast3r_sfm.evaluation.metrics import Comparison, area_under_recall, compare, find_intruders
from mast3r_sfm.evaluation.pairs import direction_angle
from mast3r_sfm.evaluation.truth import Truth, truth_from_poses
from mast3r_sfm.geometry.similarity import Similarity

seeds = st.integers(0, 2**32 - 1)
Poses = dict[str, np.ndarray]


def random_poses(generator: np.random.Generator, count: int) -> Poses:
    rotations = Rotation.random(count, rng=generator).as_matrix()
    translations = generator.normal(size=(count, 3))
    return {f"{i:02d}": np.column_stack([rotations[i], translations[i]]) for i in range(count)}


def disturbed(poses: Poses, generator: np.random.Generator, degrees: float, shift: float) -> Poses:
    return {
        name: np.column_stack(
            [
                Rotation.from_rotvec(np.radians(generator.normal(scale=degrees, size=3))).as_matrix() @ pose[:, :3],
                pose[:, 3] + generator.normal(scale=shift, size=3),
            ]
        )
        for name, pose in poses.items()
    }


def in_other_frame(poses: Poses, frame: Similarity) -> Poses:
    """The same cameras, with the world moved by `frame`."""
    moved = {}
    for name, pose in poses.items():
        rotation = pose[:, :3] @ frame.rotation.T
        moved[name] = np.column_stack([rotation, frame.scale * pose[:, 3] - rotation @ frame.translation])
    return moved


def turned(pose: np.ndarray, degrees: float) -> np.ndarray:
    """The same centre, the camera turned about its own y axis."""
    return Rotation.from_euler("y", degrees, degrees=True).as_matrix() @ pose


def slow_errors(models: list[Poses], truth: Truth) -> list[tuple[float, float]]:
    """Rotation and translation error of every pair, spelled out with loops."""
    errors = []
    names = sorted(truth.cam_from_world)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if truth.scene[first] != truth.scene[second]:
                continue
            model = next((model for model in models if first in model and second in model), None)
            if model is None:
                errors.append((180.0, 180.0))
                continue
            true, found = (
                np.vstack([poses[second], [0, 0, 0, 1]]) @ np.linalg.inv(np.vstack([poses[first], [0, 0, 0, 1]]))
                for poses in (truth.cam_from_world, model)
            )
            rotation = Rotation.from_matrix(true[:3, :3].T @ found[:3, :3]).magnitude()
            cosine = true[:3, 3] @ found[:3, 3] / np.linalg.norm(true[:3, 3]) / np.linalg.norm(found[:3, 3])
            errors.append((math.degrees(rotation), math.degrees(math.acos(min(1.0, max(-1.0, cosine))))))
    return errors


def slow_area(errors: list[float], threshold: float) -> float:
    """The trapezoid rule over the recall curve, spelled out."""
    area, previous_error, previous_recall = 0.0, 0.0, 0.0
    for rank, error in enumerate(sorted(errors), start=1):
        if error >= threshold:
            break
        recall = rank / len(errors)
        area += (error - previous_error) * (recall + previous_recall) / 2
        previous_error, previous_recall = error, recall
    return (area + (threshold - previous_error) * previous_recall) / threshold


class TestAreaUnderRecall:
    @given(st.lists(st.floats(0, 20), min_size=1, max_size=30), st.sampled_from([1.0, 3.0, 5.0, 10.0]))
    def test_equals_the_slow_one(self, errors: list[float], threshold: float) -> None:
        area = area_under_recall(np.array(errors), threshold)
        assert area == pytest.approx(slow_area(errors, threshold), abs=1e-12)
        assert 0.0 <= area <= 1.0

    def test_by_hand(self) -> None:
        # Rises to 1/2 over [0, 1], stays there: (0.25 + 0.5) / 2.
        assert area_under_recall(np.array([1.0, 9.0]), 2.0) == pytest.approx(0.375)
        assert area_under_recall(np.zeros(4), 5.0) == 1.0
        assert area_under_recall(np.full(4, 180.0), 5.0) == 0.0
        assert area_under_recall(np.array([5.0]), 5.0) == 0.0

    @given(seeds)
    def test_falls_as_errors_grow_and_approaches_the_exact_area(self, seed: int) -> None:
        errors = np.random.default_rng(seed).uniform(0, 8, size=400)
        area = area_under_recall(errors, 5.0)
        assert area > area_under_recall(errors + 0.5, 5.0)
        exact = float(np.clip(1 - errors / 5.0, 0, None).mean())
        assert exact <= area <= exact + 0.5 / 400


class TestDirectionAngle:
    def test_small_angles_keep_their_digits(self) -> None:
        tiny = 1e-12
        angle = direction_angle(np.array([1e5, 0, 0]), np.array([1e-3, 1e-3 * tiny, 0]))
        assert float(angle) == pytest.approx(tiny, rel=1e-6)

    def test_sign_and_zero(self) -> None:
        right = np.array([[1.0, 0, 0]] * 4)
        others = np.array([[2.0, 0, 0], [0, 3, 0], [-1, 0, 0], [0, 0, 0]])
        np.testing.assert_allclose(direction_angle(right, others), [0, np.pi / 2, np.pi, np.pi])


class TestCompare:
    @given(seeds, st.integers(2, 9))
    def test_equals_the_slow_one(self, seed: int, count: int) -> None:
        generator = np.random.default_rng(seed)
        truth = Truth(
            cam_from_world=(poses := random_poses(generator, count + 2)),
            scene={name: "a" if int(name) < count else "b" for name in poses},
        )
        estimate = disturbed(poses, generator, degrees=2.0, shift=0.05)
        names = sorted(estimate)
        models = [
            {name: estimate[name] for name in names[: count // 2 + 1]},
            {name: poses[name] for name in names[count // 2 :]},
        ]
        found = compare(models, truth)
        slow = np.array(slow_errors(models, truth))
        np.testing.assert_allclose(found.pairs.rotation_deg, slow[:, 0], atol=1e-5)
        np.testing.assert_allclose(found.pairs.translation_deg, slow[:, 1], atol=1e-5)
        for threshold, area in found.auc.items():
            assert area == pytest.approx(slow_area(slow.max(axis=1).tolist(), threshold), abs=1e-5)

    @given(seeds)
    def test_frame_and_scale_do_not_matter(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        poses = random_poses(generator, 7)
        estimate = disturbed(poses, generator, degrees=1.0, shift=0.02)
        frame = Similarity(
            scale=float(np.exp(generator.uniform(-6, 6))),
            rotation=Rotation.random(rng=generator).as_matrix(),
            translation=generator.normal(size=3),
        )
        truth = truth_from_poses(poses)
        plain, moved = compare([estimate], truth), compare([in_other_frame(estimate, frame)], truth)
        np.testing.assert_allclose(moved.pairs.error_deg, plain.pairs.error_deg, atol=1e-7)
        assert plain.ate_of_size is not None
        assert moved.ate_of_size == pytest.approx(plain.ate_of_size, rel=1e-7)

    def test_perfect(self) -> None:
        poses = random_poses(np.random.default_rng(0), 6)
        found = compare([poses], truth_from_poses(poses))
        assert found.auc == pytest.approx({1: 1.0, 3: 1.0, 5: 1.0, 10: 1.0}, abs=1e-9)
        assert found.rotation_accuracy == found.translation_accuracy == {5: 1.0, 15: 1.0}
        assert found.registered == found.registered_in_largest == found.images == 6
        assert found.ate_of_size is not None
        assert found.ate_of_size < 1e-12

    def test_error_of_known_size(self) -> None:
        poses = random_poses(np.random.default_rng(1), 4)
        estimate = poses | {"03": turned(poses["03"], 4.0)}
        found = compare([estimate], truth_from_poses(poses))
        # Pairs (0,3), (1,3), (2,3): the rotation is 4° off, the direction, seen from camera 3, at most as much.
        touched = [2, 4, 5]
        np.testing.assert_allclose(found.pairs.rotation_deg[touched], 4.0, atol=1e-9)
        np.testing.assert_allclose(found.pairs.error_deg[[0, 1, 3]], 0.0, atol=1e-5)
        assert (found.pairs.translation_deg[touched] <= 4.0 + 1e-9).all()
        assert (found.pairs.translation_deg[touched] > 0.1).all()
        assert found.rotation_accuracy[5] == 1.0
        assert found.median_rotation_deg == pytest.approx(2.0)
        assert found.scenes[0].trajectory is not None
        assert found.scenes[0].trajectory.rmse < 1e-12

    def test_mirrored_translation_is_an_error(self) -> None:
        poses = {"a": np.eye(3, 4), "b": np.column_stack([np.eye(3), [1.0, 0, 0]])}
        estimate = poses | {"b": np.column_stack([np.eye(3), [-1.0, 0, 0]])}
        found = compare([estimate], truth_from_poses(poses))
        assert found.pairs.translation_deg.tolist() == [180.0]
        assert found.translation_accuracy == {5: 0.0, 15: 0.0}

    def test_no_model_is_a_failure_of_every_pair(self) -> None:
        truth = truth_from_poses(random_poses(np.random.default_rng(2), 5))
        found = compare([], truth)
        assert set(found.auc.values()) == {0.0}
        assert found.median_rotation_deg == found.median_translation_deg == 180.0
        assert found.missing == tuple(sorted(truth.scene))
        assert (found.registered, found.registered_in_largest, found.models) == (0, 0, 0)
        assert found.ate_of_size is None
        assert found.scenes[0].model is None
        json.dumps(found.to_dict(), allow_nan=False)

    def test_pairs_across_models_fail(self) -> None:
        poses = random_poses(np.random.default_rng(3), 6)
        names = sorted(poses)
        halves = [{name: poses[name] for name in names[:4]}, {name: poses[name] for name in names[4:]}]
        found = compare(halves, truth_from_poses(poses))
        assert int(found.pairs.is_measured.sum()) == 6 + 1
        assert found.auc[5] == pytest.approx(7 / 15, abs=1e-5)
        assert found.rotation_accuracy[15] == pytest.approx(7 / 15)
        assert (found.registered, found.registered_in_largest) == (6, 4)
        assert (found.scenes[0].model, found.scenes[0].registered) == (0, 4)

    def test_the_larger_model_counts_where_two_hold_a_pair(self) -> None:
        poses = random_poses(np.random.default_rng(4), 4)
        wrong = {name: turned(poses[name], 10.0 * index) for index, name in enumerate(["00", "01"])}
        assert compare([poses, wrong], truth_from_poses(poses)).auc[1] == pytest.approx(1.0, abs=1e-5)
        assert compare([wrong, poses], truth_from_poses(poses)).pairs.rotation_deg[0] == pytest.approx(10.0)

    def test_unknown_images_are_named_and_not_judged(self) -> None:
        poses = random_poses(np.random.default_rng(5), 5)
        truth = truth_from_poses({name: poses[name] for name in ("00", "01", "02")})
        found = compare([poses], truth)
        assert found.unknown == ("03", "04")
        assert found.intruders == ()
        assert (found.registered, found.images, len(found.pairs)) == (3, 3, 3)


class TestPureRotation:
    def truth(self) -> Truth:
        generator = np.random.default_rng(6)
        centre = np.array([3.0, -2.0, 7.0])
        rotations = Rotation.random(5, rng=generator).as_matrix()
        return truth_from_poses({f"{i}": np.column_stack([r, -r @ centre]) for i, r in enumerate(rotations)})

    def test_only_rotation_counts(self) -> None:
        truth = self.truth()
        invented = {
            name: np.column_stack([turned(pose, 0.0)[:, :3], pose[:, 3] + int(name)])
            for name, pose in truth.cam_from_world.items()
        }
        found = compare([invented], truth)
        assert found.auc[1] == pytest.approx(1.0, abs=1e-5)
        assert found.translation_accuracy is None
        assert found.median_translation_deg is None
        assert found.ate_of_size is None
        assert not found.pairs.has_baseline.any()
        json.dumps(found.to_dict(), allow_nan=False)

    def test_rotation_errors_and_absence_still_count(self) -> None:
        truth = self.truth()
        poses = dict(truth.cam_from_world)
        del poses["0"]
        poses["1"] = turned(poses["1"], 2.0)
        found = compare([poses], truth)
        assert sorted(found.pairs.error_deg.round(6)) == [0.0] * 3 + [2.0] * 3 + [180.0] * 4

    def test_one_pair_without_baseline_among_others(self) -> None:
        poses = random_poses(np.random.default_rng(7), 4)
        poses["01"] = turned(poses["00"], 30.0)
        found = compare([poses], truth_from_poses(poses))
        assert found.pairs.has_baseline.tolist() == [False, True, True, True, True, True]
        assert found.auc[1] == pytest.approx(1.0, abs=1e-5)

    def test_coinciding_estimate_of_a_moving_camera_fails(self) -> None:
        poses = random_poses(np.random.default_rng(8), 4)
        still = {name: np.column_stack([pose[:, :3], np.zeros(3)]) for name, pose in poses.items()}
        found = compare([still], truth_from_poses(poses))
        assert found.pairs.rotation_deg.max() < 1e-5
        assert found.pairs.translation_deg.tolist() == [180.0] * 6
        assert found.ate_of_size is not None
        assert 0.2 < found.ate_of_size < 1.0


class TestTrajectory:
    def shifted(self) -> tuple[Truth, Comparison]:
        """Twenty cameras, one of them ten times the scene size away."""
        poses = random_poses(np.random.default_rng(9), 20)
        truth = truth_from_poses(poses)
        estimate = dict(poses)
        estimate["07"] = np.column_stack([poses["07"][:, :3], poses["07"][:, 3] + 30.0])
        return truth, compare([estimate], truth)

    def test_one_camera_far_away(self) -> None:
        _, found = self.shifted()
        trajectory = found.scenes[0].trajectory
        assert trajectory is not None
        assert trajectory.outliers == ("07",)
        assert trajectory.median < 1e-9
        assert 0.5 < trajectory.rmse < trajectory.scene_size

    def test_sizes(self) -> None:
        truth, found = self.shifted()
        centres = [-pose[:, :3].T @ pose[:, 3] for _, pose in sorted(truth.cam_from_world.items())]
        trajectory = found.scenes[0].trajectory
        assert trajectory is not None
        assert trajectory.scene_size == pytest.approx(max(np.linalg.norm(a - b) for a in centres for b in centres))
        assert trajectory.path_length == pytest.approx(
            sum(np.linalg.norm(a - b) for a, b in zip(centres[1:], centres[:-1], strict=True))
        )
        assert trajectory.rmse_of_path == pytest.approx(trajectory.rmse / trajectory.path_length)

    def test_cameras_on_a_line(self) -> None:
        poses = {f"{i}": np.column_stack([np.eye(3), [0, 0, -float(i)]]) for i in range(6)}
        estimate = poses | {"5": np.column_stack([np.eye(3), [0, 0, -5.6]])}
        found = compare([estimate], truth_from_poses(poses))
        assert found.ate_of_size is not None
        assert 0.005 < found.ate_of_size < 0.1

    def test_two_images_have_no_trajectory(self) -> None:
        poses = random_poses(np.random.default_rng(10), 2)
        assert compare([poses], truth_from_poses(poses)).ate_of_size is None


class TestIntruders:
    @pytest.mark.parametrize(
        ("models", "intruders"),
        [
            ([], ()),
            ([["a1", "a2", "a3"], ["b1", "b2"]], ()),
            ([["a1", "a2", "a3", "b2", "b1"]], ("b1", "b2")),
            ([["a1", "b1", "b2"]], ("a1",)),
            ([["a1", "b1"]], ("b1",)),
            ([["a1", "a2", "x"], ["y", "x"]], ("x", "y")),
            ([["a1", "a2", "neither"]], ()),
        ],
    )
    def test_who_does_not_belong(self, models: list[list[str]], intruders: tuple[str, ...]) -> None:
        scene = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b"}
        assert find_intruders(models, scene, ("x", "y")) == intruders

    def test_in_a_comparison(self) -> None:
        poses = random_poses(np.random.default_rng(11), 6)
        truth = Truth(
            cam_from_world={name: pose for name, pose in poses.items() if name != "05"},
            scene={name: "a" if name < "03" else "b" for name in poses if name != "05"},
            unrelated=("05",),
        )
        found = compare([poses], truth)
        assert found.intruders == ("03", "04", "05")
        assert found.wrong_joins == 3
        assert found.unknown == ()
        # Poses are compared inside a scene only: three pairs of a, one of b.
        assert len(found.pairs) == 4
        assert [(scene.scene, scene.images, scene.registered) for scene in found.scenes] == [("a", 3, 3), ("b", 2, 2)]


class TestWrongUse:
    def test_nothing_in_common(self) -> None:
        poses = random_poses(np.random.default_rng(12), 3)
        with pytest.raises(InputError, match=r"'images/00'.*'00'"):
            compare([{f"images/{name}": pose for name, pose in poses.items()}], truth_from_poses(poses))

    def test_no_pair(self) -> None:
        poses = random_poses(np.random.default_rng(13), 2)
        truth = Truth(cam_from_world=poses, scene={"00": "a", "01": "b"})
        with pytest.raises(InputError, match="two images"):
            compare([poses], truth)

    @pytest.mark.parametrize("pose", [np.eye(4), np.full((3, 4), np.nan)])
    def test_broken_pose(self, pose: np.ndarray) -> None:
        poses = random_poses(np.random.default_rng(14), 3)
        with pytest.raises(ShapeError, match="pose of 01"):
            compare([poses | {"01": pose}], truth_from_poses(poses))
