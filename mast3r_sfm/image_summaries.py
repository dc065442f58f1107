"""How well the images of a model are held, and which of them deserve distrust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.uncertainty import pose_sigmas
from mast3r_sfm.summaries import ImageSummary
from mast3r_sfm.types import AlignmentResult

WEAK_SIGMA = 3.0
"""Times the median of its model by which an image's standard deviation must be larger to be called weak."""
WEAK_ROTATION_DEG, WEAK_POSITION = 0.5, 0.02
"""Standard deviations that are weak in any model."""
FEW_OBSERVATIONS = 50
"""Below this an image is held by little; it was registered by 30 at least."""


def summarise_images(
    model: ColmapModel, parts: Sequence[AlignmentResult], names: Sequence[str]
) -> tuple[ImageSummary, ...]:
    """Every registered image of a model, sorted by name.

    Args:
        model: as it is written.
        parts: the aligned parts that it came from, among others.
        names: of all photos, by number.
    """
    tracks, sigmas = model.tracks(), pose_sigmas(model)
    aligned = {
        int(image): (int(edges), float(residual))
        for part in parts
        for image, edges, residual in zip(part.images, part.num_edges, part.residual_deg, strict=False)
    }
    found = []
    for number in sorted(model.poses(), key=lambda number: names[number]):
        mine = tracks.image == number
        error = np.linalg.norm(model.project(number, tracks.points[tracks.point[mine]]) - tracks.xy[mine], axis=1)
        edges, residual = aligned.get(number, (0, None))
        rotation, position = sigmas[number] if sigmas else (None, None)
        found.append(
            ImageSummary(
                name=names[number],
                edges=edges,
                residual_deg=residual,
                observations=int(mine.sum()),
                mean_error_px=float(error.mean()) if len(error) else 0.0,
                rotation_sigma_deg=rotation,
                position_sigma=position,
            )
        )
    return _judged(found)


def _judged(images: Sequence[ImageSummary]) -> tuple[ImageSummary, ...]:
    """The images with why they are weak."""
    rotations = [image.rotation_sigma_deg for image in images if image.rotation_sigma_deg is not None]
    positions = [image.position_sigma for image in images if image.position_sigma is not None]
    most_rotation = min(WEAK_SIGMA * float(np.median(rotations)), WEAK_ROTATION_DEG) if rotations else np.inf
    most_position = min(WEAK_SIGMA * float(np.median(positions)), WEAK_POSITION) if positions else np.inf
    judged = []
    for image in images:
        reasons = []
        if image.edges == 1:
            reasons.append("one pair")
        if image.observations < FEW_OBSERVATIONS:
            reasons.append(f"{image.observations} points")
        if image.rotation_sigma_deg is not None and image.rotation_sigma_deg > most_rotation:
            reasons.append(f"rotation ±{image.rotation_sigma_deg:.2g}°")
        if image.position_sigma is not None and image.position_sigma > most_position:
            reasons.append(f"position ±{100 * image.position_sigma:.2g} %")
        judged.append(replace(image, weak=", ".join(reasons)))
    return tuple(judged)
