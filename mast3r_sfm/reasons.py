"""What a user is told of photos and pairs that are not in the result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mast3r_sfm.geometry.rigid import angle_between_rotations, compose_poses, invert_pose
from mast3r_sfm.summaries import RejectedPair
from mast3r_sfm.types import AlignmentResult, Float64, ImageSet, PairMatches, Verdict

_OVERLAY = "what lies over both photos, such as a watermark, a frame or a part of the vehicle"


def why_nothing(matches: Sequence[PairMatches], turns: Sequence[AlignmentResult] = ()) -> str:
    """Why no model could be begun, and what photos would help.

    Args:
        matches: all edges of the view graph.
        turns: parts whose photos were all taken from one point, written to rotations.json.
    """
    if not matches:
        return "no pair of photos was matched; raise the time budget, or give a list with more pairs"
    turning = [match for match in matches if match.verdict is Verdict.PURE_ROTATION]
    if turning:
        images = len({index for match in turning for index in (match.first, match.second)})
        return (
            f"pure rotation: {images} photos show the same place, but all from one point, so that nothing can be said "
            f"of depth; take photos from different positions{_known_of(turns)}"
        )
    marked = sum(match.verdict is Verdict.WATERMARK for match in matches)
    if marked:
        return (
            f"no two photos were found to show the same place: {marked} pairs match only on {_OVERLAY}; take photos "
            "with more overlap, and of something with texture"
        )
    return (
        "no two photos were found to show the same place; take photos with more overlap, and of something with texture"
    )


def say_turn(turn: AlignmentResult, names: Sequence[str]) -> str:
    """What is said of a part whose photos were all taken from one point, beside other parts that have depth."""
    first, last = names[int(turn.images[0])], names[int(turn.images[-1])]
    return (
        f"pure rotation: {len(turn.images)} photos, from {first} to {last}, show the same place, but all from one "
        f"point, so that they get no model{_known_of([turn])}"
    )


def _known_of(turns: Sequence[AlignmentResult]) -> str:
    if not turns:
        return ""
    sigma = np.concatenate([turn.rotation_sigma_deg for turn in turns])
    accuracy = f" (to about {float(sigma.max()):.2g}°, as far as the noise of the matches goes)" if len(sigma) else ""
    return f"; how the cameras were turned is known{accuracy}, and stands in rotations.json"


def describe_turns(turns: Sequence[AlignmentResult], names: Sequence[str]) -> list[dict[str, object]]:
    """What rotations.json holds: per part, the rotation of each photo from the part's frame to the camera's."""
    return [
        {
            "kind": "pure rotation",
            "photos": [
                {
                    "name": names[int(image)],
                    "cam_from_world_rotation": pose[:, :3].tolist(),
                    "focal_px": float(focal),
                    "residual_deg": float(residual),
                    "sigma_deg": float(turn.rotation_sigma_deg[row]) if len(turn.rotation_sigma_deg) else None,
                }
                for row, (image, pose, focal, residual) in enumerate(
                    zip(turn.images, turn.cam_from_world, turn.focal_px, turn.residual_deg, strict=True)
                )
            ],
        }
        for turn in turns
    ]


def why_left_out(index: int, matches: Sequence[PairMatches], photos: ImageSet, registered: set[str]) -> str:
    """Why a photo stands in no model.

    Args:
        index: of the photo.
        matches: all edges of the view graph.
        photos: of the run.
        registered: names of the photos that stand in a model.
    """
    mine = [match for match in matches if index in (match.first, match.second)]
    if not mine:
        return "stands in no pair that was matched"
    links = [match for match in mine if match.verdict.is_link]
    marked = sum(match.verdict is Verdict.WATERMARK for match in mine)
    if not links and marked:
        return f"matches {marked} other photos, but only on {_OVERLAY}"
    if not links:
        return "no other photo was found to show the same place"
    partners = {photos.names[match.second if match.first == index else match.first] for match in links}
    in_model = partners & registered
    if not in_model and all(match.verdict is Verdict.PURE_ROTATION for match in links):
        return (
            f"pure rotation: shows the same place as {', '.join(sorted(partners)[:3])}, but from the same point, so "
            "that nothing can be said of depth"
        )
    if not in_model:
        return f"matches only {', '.join(sorted(partners)[:3])}, too little for a model"
    if all(match.verdict is Verdict.PURE_ROTATION for match in links):
        return f"was taken from the same point as {min(in_model)}, and sees too little of the model"
    return f"its matches with {len(in_model)} photos of the model contradict the model, or are too few"


def rejected_pairs(
    matches: Sequence[PairMatches], parts: Sequence[AlignmentResult], names: Sequence[str]
) -> tuple[RejectedPair, ...]:
    """The pairs that passed the two-view check and that alignment dropped, those with most matches first.

    Args:
        matches: all edges of the view graph.
        parts: what they were aligned to.
        names: of the images.
    """
    kept = {int(edge) for part in parts for edge in part.edges}
    poses = [{int(image): pose for image, pose in zip(p.images, p.cam_from_world, strict=True)} for p in parts]
    dropped = [match for edge, match in enumerate(matches) if match.verdict.has_depth and edge not in kept]
    found = []
    for match in sorted(dropped, key=lambda match: (-len(match), match.first, match.second)):
        pose = next((part for part in poses if match.first in part and match.second in part), None)
        errors = None if pose is None else _pose_errors(match, pose[match.first], pose[match.second])
        found.append(
            RejectedPair(
                first=names[match.first],
                second=names[match.second],
                matches=len(match),
                rotation_error_deg=errors and errors[0],
                direction_error_deg=errors and errors[1],
            )
        )
    return tuple(found)


def _pose_errors(match: PairMatches, first: Float64, second: Float64) -> tuple[float, float]:
    """Degrees by which a pair misses the rotation and the direction of translation between two poses."""
    between = compose_poses(second, invert_pose(first))
    rotation = angle_between_rotations(match.second_from_first[:, :3], between[:, :3])
    one, two = match.second_from_first[:, 3], between[:, 3]
    direction = np.arctan2(np.linalg.norm(np.cross(one, two)), one @ two)
    return float(np.degrees(rotation)), float(np.degrees(direction))
