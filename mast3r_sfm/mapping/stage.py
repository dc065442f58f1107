"""The map stage: shared keypoints, the COLMAP database, and one bundle-adjusted model per connected part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mast3r_sfm.colmap.database import DatabaseContent, update_keypoints, write_database
from mast3r_sfm.colmap.held import Held
from mast3r_sfm.colmap.mapper import Mapper, MapperSettings
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.other_mappers import colmap_models
from mast3r_sfm.geometry.known_poses import KnownPoses, similarity_between_poses
from mast3r_sfm.mapping.keypoints import share_keypoints
from mast3r_sfm.mapping.refinement import Refiner
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.types import AlignmentResult, Float64, PairMatches, Rig, Usable

CODE_VERSION = 9
MIN_POINTS = 20
"""A model with fewer points is no evidence of anything."""
MIN_OBSERVED_SHARE = 0.1
"""Share of its images' matched keypoints that a model must explain. Right models explain 0.4 and more on the sets at
hand, a mostly wrong one 0.23. It is no proof: of an object without texture, a wrong model explained 0.6."""
KEYPOINT_RADIUS = 1.0
"""Pixels of matching within which what pairs and detectors find is one keypoint; half as much where photos were seen at
less than SMALL_PX, since there a pixel is a place of its own."""
SMALL_PX = 256
MIN_SHARED = 15
"""Points of three views that hold two images together, in models of more than MAX_PAIRED images. In right models, the
least that ties an image to the others is 44 before refinement and 16 after it; between two halves of a ring that hung
on thin pairs, and stood to each other as it happened, it was 13; and wrong images kept 3, beside up to 28 points of two
views, which say no more than the pair did."""
MAX_PAIRED = 3
MIN_CONFIRMED = 10
"""Points, of two views as well, of a pair of images that other pairs confirmed before (`MapInput.confirmed`)."""
MIN_REFINED_PX = 128
"""Long side of photos below which they are not refined: a patch shows too much of the surface to be flat.

With the oracle and 1 px of noise, mean errors of rotations go from 0.36° to 0.12° at 128 px, from 0.09° to 0.04° at
256 px, and from 0.04° to 0.01° at 400 px (an object); with half a pixel at 96 px, from 0.31° to 0.48° (a façade).
"""
MIN_OBSERVATIONS = 6
"""Refined observations that every image must keep, unless it had fewer: its pose rests on them."""
DOUBTFUL_SHARE = 0.3
"""Below this share a model is kept, and said to be doubtful."""


@dataclass(frozen=True, kw_only=True)
class MapInput:
    """What the map stage works on."""

    names: Sequence[str]
    rig: Rig
    matches: Sequence[PairMatches]
    """All edges of the view graph."""
    parts: Sequence[AlignmentResult]
    detected: bool = True
    """The matched pixels are keypoints, the same in all pairs of an image. Those of a dense model are not: they lie
    side by side, two pairs hit neighbouring ones by their noise, and the geometry has to tell tracks apart."""
    matched_px: float | None = None
    """Photo pixels per pixel that was matched, where that is not a pixel of matching: in windows at full resolution."""
    known: KnownPoses | None = None
    """Poses in whose frame the first part is."""

    @property
    def fixed_poses(self) -> dict[int, Float64]:
        """cam_from_world [7] of the images whose pose nothing changes, by number."""
        if self.known is None or not self.known.is_fixed:
            return {}
        return dict(zip(self.known.images.tolist(), self.known.params, strict=True))

    usable: Usable | None = None
    """Says where keypoints may lie; the matches lie there already. None: everywhere."""
    confirmed: frozenset[tuple[int, int]] = frozenset()
    """Pairs by which two parts were joined, since they agree on how these stand to each other and nothing rivals it."""


def write_matches(path: Path, given: MapInput, settings: MapperSettings) -> None:
    """Write database.db with the shared keypoints and the verified pairs."""
    verified = trusted_matches(given)
    sizes = [max(camera.width_px, camera.height_px) for camera in given.rig.cameras]
    is_small = min(sizes) < SMALL_PX * settings.pixel_scale
    radius = KEYPOINT_RADIUS * (given.matched_px or settings.pixel_scale) * (0.5 if is_small else 1.0)
    keypoints, indices = share_keypoints(verified, len(given.names), radius, split=given.detected, usable=given.usable)
    content = DatabaseContent(
        names=given.names,
        rig=given.rig,
        camera_model=settings.config.camera_model,
        keypoints=keypoints,
        matches=verified,
        indices=indices,
    )
    write_database(path, content)


def trusted_matches(given: MapInput) -> list[PairMatches]:
    """The verified pairs, without those that contradict the alignment of the images that they join."""
    aligned = {int(image) for part in given.parts for image in part.images}
    agreeing = {int(edge) for part in given.parts for edge in part.edges}
    trusted = []
    for edge, match in enumerate(given.matches):
        contradicts = match.first in aligned and match.second in aligned and edge not in agreeing
        if match.verdict.is_link and not (match.verdict.has_depth and contradicts):
            trusted.append(match)
    return trusted


def build_models(
    database: Path, given: MapInput, settings: MapperSettings, progress: Progress, refiner: Refiner | None = None
) -> list[ColmapModel]:
    """One model per aligned part, largest first; an image stands in one model only.

    What stands in the frame of known poses comes before all others.

    Args:
        database: as `write_matches` wrote it.
        given: images, edges and aligned parts.
        settings: of triangulation and bundle adjustment.
        progress: is told of every part.
        refiner: moves the models' observations to a fraction of a pixel, where given.
    """
    models: list[ColmapModel] = []
    taken: set[str] = set()
    confirmed = {image for pair in given.confirmed for image in pair}
    mapper = Mapper(database, settings, Held.of(given.rig, given.fixed_poses), confirmed)
    is_ours = settings.config.mapper == "align"
    is_rough = is_ours and refiner is not None
    for model, build_in_full in (
        _own_models(mapper, given, taken, progress, rough=is_rough)
        if is_ours
        else _models_by_colmap(database, settings, taken, progress)
    ):
        share = model.observed_share
        if model.num_points < MIN_POINTS or share < MIN_OBSERVED_SHARE:
            continue
        final = model
        if refiner is not None and _is_large_enough(model):
            final = _refined(model, mapper, refiner, complete=not given.detected)
        if final is model:
            final = build_in_full()
        # Refinement may have shown that what held an image was nothing.
        groups = _groups(final, given)
        pieces = [final] if len(groups) == 1 else [final.restricted_to(group) for group in groups if len(group) > 1]
        for piece in pieces:
            if piece.num_points < MIN_POINTS:
                continue
            taken.update(piece.cam_from_world)
            models.append(piece)
            if share < DOUBTFUL_SHARE:
                others = len(piece.cam_from_world) - 1
                progress.warn(
                    f"the model of {min(piece.cam_from_world)} and {others} more photos explains only {share:.0%} "
                    "of their matches; its poses may be wrong"
                )
    models.sort(key=_largest_first)
    if is_ours:
        models = _with_left_out(models, mapper, refiner, given)
    if refiner is not None:
        for model in models:
            update_keypoints(database, model.keypoints())
    if given.known is None:
        return sorted(models, key=_largest_first)
    known = {given.names[image] for image in given.known.images}
    models.sort(
        key=lambda model: (len(known & model.cam_from_world.keys()) < min(2, len(known)), _largest_first(model))
    )
    return [_in_known_frame(model, given.known) for model in models]


def _largest_first(model: ColmapModel) -> tuple[int, int]:
    return -len(model.cam_from_world), -model.num_points


def _with_left_out(
    models: Sequence[ColmapModel], mapper: Mapper, refiner: Refiner | None, given: MapInput
) -> list[ColmapModel]:
    """The models with images that stand in none of them, where a finished model holds one after all.

    What was found to stand apart stays apart: no image changes its model, and one that next to nothing ties to the
    others of a model is not held by it.

    Args:
        models: finished, largest first.
        mapper: of their database.
        refiner: of their photos, where observations are refined.
        given: what the models were made of.
    """
    free = set(range(len(given.names))).difference(*(model.names() for model in models))
    grown = []
    for model in models:
        larger = mapper.register_again(model, free) if free else None
        if larger is not None and refiner is not None and _is_large_enough(larger):
            refined = _refined(larger, mapper, refiner, complete=not given.detected)
            larger = None if refined is larger else refined
        if larger is not None and len(_groups(larger, given)) == 1:
            model = larger
        grown.append(model)
        free -= model.names().keys()
    return grown


_Built = tuple[ColmapModel, Callable[[], ColmapModel]]
"""A model, and what gives it as it is to stay where its observations are not refined: built in full."""


def _as_it_is(model: ColmapModel) -> ColmapModel:
    return model


def _own_models(
    mapper: Mapper, given: MapInput, taken: Set[str], progress: Progress, *, rough: bool
) -> Iterator[_Built]:
    """The models that aligned parts lead to; `taken` grows with those that are kept."""
    with steps(progress, "map", len(given.parts), "model"):
        for part in given.parts:
            poses = {
                int(image): pose
                for image, pose in zip(part.images, part.cam_from_world, strict=True)
                if given.names[image] not in taken
            }
            progress.advance()
            yield from _coherent_models(mapper, poses, taken, given, rough=rough)


def _models_by_colmap(
    database: Path, settings: MapperSettings, taken: Set[str], progress: Progress
) -> Iterator[_Built]:
    """COLMAP's models, their groups each by itself, without images of those that were `taken` before."""
    with steps(progress, "map", 1, "model"):
        found = colmap_models(database, settings)
        progress.advance()
    for model in found:
        free = [image for image, name in model.names().items() if name not in taken]
        for group in model.restricted_to(free).groups(MIN_SHARED):
            if len(group) > 1:
                part = model.restricted_to(group)
                yield part, partial(_as_it_is, part)


def _coherent_models(
    mapper: Mapper, poses: Mapping[int, Float64], taken: Set[str], given: MapInput, *, rough: bool
) -> Iterator[_Built]:
    """The model that poses lead to; its groups each by itself, where next to nothing holds them together.

    Args:
        mapper: of the database.
        poses: cam_from_world [3, 4] by image number.
        taken: names of images that stand in other models; the poses are of none of them.
        given: says what holds groups together besides common points.
        rough: as for `Mapper.build`.
    """
    nobody: frozenset[int] = frozenset()
    waiting = [(poses, True, nobody)]
    while waiting:
        some, grow, foreign = waiting.pop(0)
        if len(some) < 2:
            continue
        model = mapper.build(some, grow=grow, rough=rough)
        groups = _groups(model, given)
        is_mixed = bool(taken & model.cam_from_world.keys() or foreign & model.poses().keys())
        # A group may take in what no other holds, but not grow to what has just been taken apart.
        if grow and (is_mixed or (foreign and len(groups) > 1)):
            grow = False
            model = mapper.build(some, grow=grow, rough=rough)
            groups = _groups(model, given)
        if len(groups) == 1:
            yield model, partial(mapper.build, some, grow=grow) if rough else partial(_as_it_is, model)
            continue
        found = model.poses()
        placed = frozenset(image for group in groups if len(group) > 1 for image in group)
        for group in groups:
            others = placed.difference(group)
            waiting.append(({image: found[image] for image in group}, bool(others) and not foreign, others))


def _groups(model: ColmapModel, given: MapInput) -> list[list[int]]:
    """Images that common points, known poses or pairs confirmed before hold together; those of known pose first."""
    views = 2 if len(model.cam_from_world) <= MAX_PAIRED else 3
    groups = [frozenset(group) for group in model.groups(MIN_SHARED, views)]
    loose = [frozenset(group) for group in model.groups(MIN_CONFIRMED)] if given.confirmed else []
    pairs = [frozenset(pair) for pair in sorted(given.confirmed)]
    for tie in [*(pair for pair in pairs if any(pair <= group for group in loose)), frozenset(given.fixed_poses)]:
        tied = [group for group in groups if not tie.isdisjoint(group)]
        groups = [*([frozenset().union(*tied)] if tied else []), *(group for group in groups if tie.isdisjoint(group))]
    if not given.fixed_poses:
        groups.sort(key=lambda group: (-len(group), min(group)))
    return [sorted(group) for group in groups]


def _in_known_frame(model: ColmapModel, known: KnownPoses) -> ColmapModel:
    """The model in the frame of known poses, where it holds two of them; otherwise as it is."""
    poses = model.poses()
    mine = [row for row, image in enumerate(known.images.tolist()) if image in poses]
    if known.is_fixed or len(mine) < 2:
        return model
    found = np.array([poses[int(known.images[row])] for row in mine])
    return model.transformed(similarity_between_poses(found, known.cam_from_world[mine]))


def _is_large_enough(model: ColmapModel) -> bool:
    return min(max(camera.width_px, camera.height_px) for camera in model.cameras.values()) >= MIN_REFINED_PX


def _refined(model: ColmapModel, mapper: Mapper, refiner: Refiner, *, complete: bool) -> ColmapModel:
    """The model adjusted to refined and further observations; as it was where these do not hold all of its images.

    Args:
        model: as it was built.
        mapper: of its database.
        refiner: of its photos.
        complete: whether tracks are broken, as those of a dense model are, and to be completed. Those of detected
            keypoints become hardly longer, and their poses no better.
    """
    tracks = model.tracks()
    refined = refiner.refine(tracks, model)
    adjusted = mapper.readjust(model.moved(tracks, refined.xy, refined.kept), settle=False)
    if not _holds_all(adjusted, model):
        return model
    longer = adjusted
    if complete:
        longer = adjusted.extended(refiner.complete(adjusted.tracks(), adjusted, adjusted.lost(model)))
    further = mapper.readjust(longer.extended(refiner.extend(longer.tracks(), longer)))
    if not _holds_all(further, model):
        further = mapper.readjust(adjusted)
    return further if _holds_all(further, model) else model


def _holds_all(adjusted: ColmapModel, before: ColmapModel) -> bool:
    """Whether all images are still there and rest on something: COLMAP leaves in those that lost all observations."""
    if adjusted.cam_from_world.keys() != before.cam_from_world.keys():
        return False
    had, have = before.observations_of_images(), adjusted.observations_of_images()
    return adjusted.num_points >= MIN_POINTS and all(
        have[image] >= min(count, MIN_OBSERVATIONS) for image, count in had.items()
    )


def photo_scale(scales: Sequence[float]) -> float:
    """Photo pixels per pixel of matching for a whole collection: the median over its images."""
    return float(np.median(scales))
