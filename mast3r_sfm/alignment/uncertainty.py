"""How far poses may be off by the noise of the matches: from the normal equations where the fine loss is least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from mast3r_sfm.alignment.losses import FineLoss
from mast3r_sfm.alignment.normal import DENSE, PER_IMAGE
from mast3r_sfm.alignment.problem import Scene
from mast3r_sfm.types import Bool, Float64


@dataclass(frozen=True, kw_only=True)
class Deviations:
    """Standard deviations of poses in the frame that suits all images best; [0] where not computed."""

    rotation_deg: Float64
    """[N] root mean square of the angle."""
    position: Float64
    """[N] root mean square of the distance of the camera's centre, in world units."""


def deviations(loss: FineLoss, scene: Scene, held: Bool, drifts: int = 7) -> Deviations:
    """How far poses may be off by the noise of matches that err independently of each other.

    Errors that matches share, such as those of a lens or of a pointmap over a region, are not in it.

    Args:
        loss: with the matches that count.
        scene: where it is least.
        held: [P] unknowns that are known, such as positions of cameras that only turn; no pose is one for the sake of
            the gauge.
        drifts: ways in which the world as a whole may move: 7, or 3 where it only turns.
    """
    equations = loss.linearise(scene, held)
    if int(equations.free.sum()) > DENSE:
        return Deviations(rotation_deg=np.zeros(0), position=np.zeros(0))
    matrix, free = equations.reduced(0.0)
    # What moves the world as a whole is left out, rather than one image taken for certain (inner constraints; Triggs et
    # al., 2000, section 9.4).
    values, vectors = scipy.linalg.eigh(np.asarray(matrix))
    values, vectors = values[drifts:], vectors[:, drifts:]
    variance = np.zeros(len(held))
    variance[free] = loss.unit_variance(scene) * (vectors**2 / np.maximum(values, 1e-300)).sum(axis=1)
    of_images = variance[: PER_IMAGE * loss.problem.num_images].reshape(-1, PER_IMAGE)
    # A camera's centre moves by −Rᵀ times the shift of its frame: as far.
    return Deviations(
        rotation_deg=np.degrees(np.sqrt(of_images[:, :3].sum(axis=1))),
        position=np.sqrt(of_images[:, 3:6].sum(axis=1)),
    )
