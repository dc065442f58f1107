"""Parts that weak pairs join, where one similarity explains two of them or more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mast3r_sfm.config import MatchConfig
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre, make_pose, rotation_from_axis_angle
from mast3r_sfm.matching.calibrated import View
from mast3r_sfm.matching.check import EpipolarEdge, check_pair
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.hard import MIN_AGREEING, MIN_AGREEING_SHARE
from mast3r_sfm.matching.joining import join_parts, may_be_confirmed
from mast3r_sfm.matching.stage import Matcher
from mast3r_sfm.matching.weak_pairs import Part, Similarity
from mast3r_sfm.types import AlignmentResult, Float64, PairMatches, Verdict
from tests.exact import CENTRE_PX, Describer, Scene, no_sift, random_pixels, ring

CONFIG = MatchConfig()
FIRST, SECOND = (0, 1, 2), (3, 4, 5)


def arc(seed: int = 0) -> Scene:
    """Six cameras around a cloud that fills their images."""
    scene = ring(6, turn_deg=120, seed=seed)
    return replace(scene, points=1.6 * scene.points)


@pytest.fixture
def scene() -> Scene:
    return arc()


def part(scene: Scene, images: Sequence[int]) -> Part:
    """Images with their true poses, in a frame and a scale of their own."""
    return Part.of(aligned(scene, images)) if len(images) > 1 else Part.single(images[0])


def aligned(scene: Scene, images: Sequence[int], seed: int = 0) -> AlignmentResult:
    """The same as alignment gives it."""
    rng = np.random.default_rng([seed, *images])
    turn, shift = rotation_from_axis_angle(rng.normal(size=3)), rng.normal(size=3)
    rotation = scene.poses[list(images), :, :3] @ turn
    centre = rng.uniform(0.2, 5) * (camera_centre(scene.poses[list(images)]) - shift) @ turn
    poses = make_pose(rotation, -(rotation @ centre[:, :, None])[:, :, 0])
    return AlignmentResult(
        images=np.array(images, np.int32),
        edges=np.zeros(0, np.int32),
        cam_from_world=poses,
        residual_deg=np.zeros(len(images)),
        history=(),
        stop_reason="",
        focal_px=np.full(len(images), 2 * scene.focal_px),
    )


def weak(scene: Scene, first: int, second: int, true: int = 14, wrong: int = 12, seed: int = 0) -> EpipolarEdge:
    """A pair of few matches, of which so many are true but for noise."""
    rng = np.random.default_rng([seed, first, second])
    found, _ = scene.putative(first, second, noise_px=0.3, seed=seed)
    kept = found.subset(np.arange(true))
    putative = replace(
        kept,
        xy_first=np.concatenate([kept.xy_first, random_pixels(rng, wrong)]),
        xy_second=np.concatenate([kept.xy_second, random_pixels(rng, wrong)]),
        confidence=np.ones(true + wrong, np.float32),
        is_distinct=np.ones(true + wrong, np.bool_),
    )
    edge = check_pair((first, second), putative, CONFIG, 0)
    assert not edge.verdict.is_link
    return edge


def views(scene: Scene, focal_factor: float = 1.0) -> Mapping[int, View]:
    return {
        image: View(focal_px=focal_factor * scene.focal_px, centre_px=CENTRE_PX, scale=2.0)
        for image in range(len(scene.poses))
    }


def join(scene: Scene, edges: Sequence[EpipolarEdge], *groups: Sequence[int]) -> dict[int, PairMatches]:
    return join_parts([part(scene, group) for group in groups or (FIRST, SECOND)], edges, views(scene), CONFIG, 0)


def turned_deg(scene: Scene, match: PairMatches) -> float:
    true: Float64 = scene.second_from_first(match.first, match.second)
    return float(np.degrees(angle_between_rotations(match.second_from_first[:, :3], true[:, :3])))


def test_two_weak_pairs_join_two_parts(scene: Scene) -> None:
    edges = [weak(scene, 0, 1), weak(scene, 2, 3), weak(scene, 1, 4), weak(scene, 0, 5, true=2, wrong=30)]
    joined = join(scene, edges)
    assert joined.keys() == {1, 2}  # not the one inside a part, nor the wrong one
    for number, match in joined.items():
        edge = edges[number]
        assert (match.first, match.second) == (edge.first, edge.second)
        assert match.verdict is Verdict.GOOD
        assert 13 <= len(match) <= len(edge.xy_first)
        assert 0.45 < match.inlier_ratio < 0.65
        assert 0 <= turned_deg(scene, match) < 1.5
        # Photo pixels, of which two make one that was matched, and points that project onto them.
        local = match.points_second
        projected = 2 * (scene.focal_px * local[:, :2] / local[:, 2:] + CENTRE_PX)
        assert np.abs(projected - match.xy_second).max() < 8
        moved = match.points_first @ match.second_from_first[:, :3].T + match.second_from_first[:, 3]
        assert moved == pytest.approx(match.points_second)
        assert match.points_first[:, 2].min() > 0


def test_what_a_pair_rejected_by_itself_comes_back_where_it_agrees(scene: Scene) -> None:
    edges = []
    for pair in ((2, 3), (1, 4)):
        edge = weak(scene, *pair)
        true = {tuple(xy) for xy in scene.putative(*pair, noise_px=0.3)[0].xy_first[:14].tolist()}
        lost = np.flatnonzero([tuple(xy) in true for xy in edge.xy_first.tolist()])[:3]
        kept = np.setdiff1d(np.arange(len(edge.xy_first)), lost)
        rows = np.concatenate([edge.xy_first[lost], edge.xy_second[lost], np.full((3, 1), 0.25)], axis=1)
        edges.append(
            replace(
                edge,
                xy_first=edge.xy_first[kept],
                xy_second=edge.xy_second[kept],
                confidence=edge.confidence[kept],
                is_distinct=edge.is_distinct[kept],
                rejected=np.concatenate([edge.rejected, rows.astype(np.float32)]),
            )
        )
    joined = join(scene, edges)
    assert joined.keys() == {0, 1}
    for number, match in joined.items():
        back = match.confidence == 0.25
        assert back.sum() >= 2
        expected = {tuple(xy) for xy in (2 * edges[number].rejected[-3:, :4].astype(np.float64)).tolist()}
        found = np.concatenate([match.xy_first, match.xy_second], axis=1)[back]
        assert {tuple(xy) for xy in found.tolist()} <= expected


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_what_joins_is_right(seed: int) -> None:
    scene = arc(seed)
    edges = [weak(scene, 2, 3, seed=seed), weak(scene, 1, 4, seed=seed), weak(scene, 0, 3, 3, 25, seed=seed)]
    joined = join(scene, edges)
    assert joined.keys() <= {0, 1}
    assert all(turned_deg(scene, match) < 4 for match in joined.values())


def test_one_pair_joins_nothing(scene: Scene) -> None:
    assert join(scene, [weak(scene, 2, 3)]) == {}


def test_pairs_of_one_image_leave_the_scale_open(scene: Scene) -> None:
    assert join(scene, [weak(scene, 2, 3), weak(scene, 2, 4), weak(scene, 2, 5)]) == {}


def test_chance_joins_nothing(scene: Scene) -> None:
    edges = [weak(scene, first, second, true=0, wrong=28) for first in FIRST for second in SECOND]
    assert sum(map(may_be_confirmed, edges)) >= 2  # else nothing would be tried
    assert join(scene, edges) == {}


def test_pairs_that_contradict_each_other_join_nothing(scene: Scene) -> None:
    other = arc(1)
    assert join(scene, [weak(scene, 2, 3), weak(other, 1, 4)]) == {}


def test_two_similarities_that_explain_as_much_join_nothing(scene: Scene) -> None:
    # The second part in another place as well: turned about the scene, with its images as before to each other.
    turn = rotation_from_axis_angle(np.array([0.0, 0.5, 0.0]))
    other = replace(scene, poses=scene.poses.copy())
    other.poses[3:, :, :3] = scene.poses[3:, :, :3] @ turn
    true, rivals = [weak(scene, 2, 3), weak(scene, 1, 4)], [weak(other, 0, 4), weak(other, 1, 5)]
    assert join(scene, true).keys() == {0, 1}
    assert join(other, rivals).keys() == {0, 1}
    assert join(scene, [*true, *rivals]) == {}


def test_an_image_by_itself_is_joined_by_two_pairs(scene: Scene) -> None:
    edges = [weak(scene, 1, 3), weak(scene, 2, 3)]
    for groups in ((FIRST, (3,)), ((3,), FIRST)):
        joined = join(scene, edges, *groups)
        assert joined.keys() == {0, 1}
        assert all(0 <= turned_deg(scene, match) < 2 for match in joined.values())


def test_rotations_that_matches_leave_open_join_nothing() -> None:
    # A small thing in the middle of the photos: a turn about it is as good as a way past it.
    near = arc()
    far = replace(near, points=0.3 * near.points)
    assert join(near, [weak(near, 2, 3), weak(near, 1, 4)]).keys() == {0, 1}
    assert join(far, [weak(far, 2, 3), weak(far, 1, 4)]) == {}


@pytest.mark.parametrize(("more", "joined"), [(1, {0, 1}), (8, set())])
def test_pairs_whose_own_geometries_say_something_else_join_nothing(scene: Scene, more: int, joined: set[int]) -> None:
    def with_others(edge: EpipolarEdge) -> EpipolarEdge:
        """The pair with further matches that agree with it, as it says, but not with the truth."""
        rng = np.random.default_rng(edge.first)
        return replace(
            edge,
            xy_first=np.concatenate([edge.xy_first, random_pixels(rng, more)]),
            xy_second=np.concatenate([edge.xy_second, random_pixels(rng, more)]),
            confidence=np.ones(len(edge.xy_first) + more, np.float32),
            is_distinct=np.append(edge.is_distinct, np.ones(more, np.bool_)),
        )

    assert join(scene, [with_others(weak(scene, 2, 3)), with_others(weak(scene, 1, 4))]).keys() == joined


def test_what_may_be_confirmed(scene: Scene) -> None:
    edge = weak(scene, 2, 3)
    assert edge.num_inliers >= MIN_AGREEING
    assert may_be_confirmed(edge)
    assert not may_be_confirmed(replace(edge, verdict=Verdict.GOOD))
    assert not may_be_confirmed(replace(edge, num_putative=round(edge.num_inliers / MIN_AGREEING_SHARE) + 1))
    few = edge.is_distinct & (np.arange(len(edge.is_distinct)) < MIN_AGREEING - 1)
    assert not may_be_confirmed(replace(edge, is_distinct=few, num_putative=10))


def test_a_similarity_and_its_numbers() -> None:
    similarity = Similarity(
        rotation=rotation_from_axis_angle(np.array([0.3, -1.0, 0.2])), shift=np.array([1.0, -2, 3]), scale=2.5
    )
    again = Similarity.of(similarity.values)
    assert again.rotation == pytest.approx(similarity.rotation)
    assert again.shift == pytest.approx(similarity.shift)
    assert again.scale == pytest.approx(2.5)


class TestStage:
    """As the match stage does it, with photos twice as large as what was matched."""

    def join(self, scene: Scene, edges: Sequence[EpipolarEdge], *groups: Sequence[int]) -> dict[int, PairMatches]:
        model = Describer(scene, photo_scale=2)
        checker = PairChecker(model=model, encodings=model.encodings(), config=CONFIG, seed=0, threads=1)
        matcher = Matcher(checker=checker, num_images=6, detect_sift=no_sift)
        # The rig's focal length is wrong, but that of the parts is right.
        rig = scene.rig(photo_scale=2, focal_factor=1.4)
        return matcher.join(edges, [aligned(scene, group) for group in groups], rig)

    def test_parts_are_joined_by_their_own_focal_lengths(self, scene: Scene) -> None:
        edges = [weak(scene, 0, 4, 2, 30), weak(scene, 2, 3), weak(scene, 1, 4)]
        joined = self.join(scene, edges, FIRST, SECOND)
        assert joined.keys() == {1, 2}
        assert [(match.first, match.second) for match in joined.values()] == [(2, 3), (1, 4)]
        assert max(match.xy_second[:, 0].max() for match in joined.values()) > 640
        assert all(turned_deg(scene, match) < 1.5 for match in joined.values())

    def test_one_part_of_all_images_has_nothing_to_join(self, scene: Scene) -> None:
        assert self.join(scene, [weak(scene, 2, 3), weak(scene, 1, 4)], range(6)) == {}

    def test_without_a_part_nothing_is_joined(self, scene: Scene) -> None:
        assert self.join(scene, [weak(scene, 2, 3), weak(scene, 1, 4)]) == {}
