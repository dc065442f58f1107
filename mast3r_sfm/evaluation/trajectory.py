"""Errors of camera centres after a similarity alignment (absolute trajectory error, ATE).

J. Sturm et al., "A Benchmark for the Evaluation of RGB-D SLAM Systems", IROS 2012, with the scale aligned as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mast3r_sfm.geometry.rigid import camera_centre
from mast3r_sfm.geometry.similarity import align_similarity, align_similarity_robust, spanned_dimensions
from mast3r_sfm.types import Float64


@dataclass(frozen=True, kw_only=True)
class TrajectoryError:
    """How far the camera centres of one model are from the truth, in units of the truth."""

    images: int
    """Centres compared."""
    rmse: float
    """Root mean square distance after the least-squares similarity: the ATE."""
    median: float
    """Median distance after a similarity that ignores outliers; far below `rmse` where few cameras are badly wrong."""
    outliers: tuple[str, ...]
    """Names of the images that the second similarity left out."""
    scene_size: float
    """Largest distance between two of the true centres compared."""
    path_length: float
    """Sum of the distances between the true centres, in the order of their names."""

    @property
    def rmse_of_size(self) -> float:
        """ATE as a share of the scene size."""
        return self.rmse / self.scene_size

    @property
    def rmse_of_path(self) -> float:
        """ATE as a share of the path length."""
        return self.rmse / self.path_length


def measure_trajectory(
    model: Mapping[str, Float64], truth: Mapping[str, Float64], names: Sequence[str]
) -> TrajectoryError | None:
    """Compare the centres of those of `names` that the model holds.

    Args:
        model: cam_from_world [3, 4] by name.
        truth: cam_from_world [3, 4] of every one of `names`.
        names: images of one scene, in the order of the path.

    Returns:
        The errors; None where there are fewer than three images (a similarity then fits anything) or where the true
        centres coincide.
    """
    shared = [name for name in names if name in model]
    if len(shared) < 3:
        return None
    target = camera_centre(np.stack([truth[name] for name in shared]))
    source = camera_centre(np.stack([np.asarray(model[name], dtype=np.float64) for name in shared]))
    if spanned_dimensions(target) == 0:
        return None
    least_squares, robust, outliers = _distances(source, target, shared)
    return TrajectoryError(
        images=len(shared),
        rmse=float(np.sqrt((least_squares**2).mean())),
        median=float(np.median(robust)),
        outliers=outliers,
        scene_size=max(float(np.linalg.norm(target - centre, axis=1).max()) for centre in target),
        path_length=float(np.linalg.norm(np.diff(target, axis=0), axis=1).sum()),
    )


def _distances(source: Float64, target: Float64, names: Sequence[str]) -> tuple[Float64, Float64, tuple[str, ...]]:
    """Distances [n] after both alignments, and the outliers of the second."""
    if spanned_dimensions(source) == 0:
        # A model whose cameras all stand in one point: the best that a similarity can do is to put them in the middle.
        distances = np.linalg.norm(target - target.mean(axis=0), axis=1)
        return distances, distances, ()
    similarity = align_similarity(source, target, collinear_ok=True)
    robust, inliers = align_similarity_robust(source, target)
    return (
        np.linalg.norm(similarity.apply(source) - target, axis=1),
        np.linalg.norm(robust.apply(source) - target, axis=1),
        tuple(name for name, fits in zip(names, inliers, strict=True) if not fits),
    )
