"""Where a patch of one image lies in another, to a fraction of a pixel.

Inverse compositional alignment (Baker and Matthews, Lucas-Kanade 20 years on, 2004) of the translation alone, under an
affine map that is known from the geometry. Gain and offset of the brightness are projected out. All patches of an image
are aligned together.

Shape letters: N patches, K pixels of a patch, M pixels asked for, H W an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

RADIUS = 7
"""Half the side of a patch, which counts less towards its border."""
MAX_ITERATIONS = 15
CONVERGED, NEAR = 0.01, 0.1
"""Steps in pixels below which a patch has arrived, and is near enough to go on from on a finer level."""
MAX_STEP = 1.5
_FLAT = 1e-3
"""Standard deviation of the grey values, in 0..255, of a patch that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches as references of an alignment."""

    values: Tensor
    """[N, K] of weighted mean 0 and weighted variance 1."""
    gradient: Tensor
    """[N, K, 2] along x and y per pixel of the patch, without what a change of gain or offset explains."""
    precision: Tensor
    """[N, 2, 2] Gauss–Newton matrix of the translation: its inverse times the variance of the residuals is the
    covariance of the place."""

    @classmethod
    def prepare(cls, windows: Tensor) -> Patches:
        """From windows [N, side + 2, side + 2] of an image, as `cut_windows` gives them."""
        windows = windows.float()
        along_x = (windows[:, 1:-1, 2:] - windows[:, 1:-1, :-2]) / 2
        along_y = (windows[:, 2:, 1:-1] - windows[:, :-2, 1:-1]) / 2
        values, deviation = _normalised(windows[:, 1:-1, 1:-1].flatten(1))
        gradient = torch.stack([along_x.flatten(1), along_y.flatten(1)], dim=2) / deviation[:, None, None]
        weight = _weights()[None, :, None]
        gradient = gradient - (weight * gradient).sum(dim=1, keepdim=True)
        gradient = gradient - values[:, :, None] * (weight * values[:, :, None] * gradient).sum(dim=1, keepdim=True)
        return cls(values=values, gradient=gradient, precision=(weight * gradient).transpose(1, 2) @ gradient)


class Alignment(NamedTuple):
    """Where patches were found."""

    xy: Tensor
    """[N, 2] pixels of their centres."""
    correlation: Tensor
    """[N] normalised cross-correlation with the reference, at most 1."""
    uncertainty: Tensor
    """[N] standard deviation of the place along its worst direction, in pixels of the patch."""
    converged: Tensor
    """[N] whether the last step was small."""


def smooth(image: Tensor, sigma: float) -> Tensor:
    """[H, W] convolved with a Gaussian, so that interpolation between its pixels is faithful."""
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, dtype=image.dtype) ** 2) / (2 * sigma**2))
    weights = (kernel / kernel.sum()).tolist()
    padded = functional.pad(image[None, None], (reach,) * 4, mode="replicate")[0, 0]
    return _weighted(_weighted(padded.T, weights).T, weights)


def _weighted(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """[H - K + 1, W] sums of each K successive rows [H, W]: 25 times as fast as a convolution of one channel."""
    height = len(rows) - len(weights) + 1
    total = rows[:height] * weights[0]
    for first, weight in enumerate(weights[1:], start=1):
        total.add_(rows[first : first + height], alpha=weight)
    return total


def sample(image: Tensor, xy: Tensor) -> Tensor:
    """Bilinear values [...] of an image [H, W] at pixels [..., 2]; beyond its border, those of the border."""
    size = xy.new_tensor([image.shape[1], image.shape[0]])
    grid = (xy * 2 / size - 1).reshape(1, 1, -1, 2)
    values = functional.grid_sample(image[None, None], grid, padding_mode="border", align_corners=False)
    return values.reshape(xy.shape[:-1])


def cut_windows(image: Tensor, xy: Tensor, spacing: float) -> Tensor:
    """What patches around pixels of an image are made from.

    Args:
        image: [H, W] grey values.
        xy: [N, 2] their centres.
        spacing: image pixels from one pixel of a patch to the next.

    Returns:
        [N, side + 2, side + 2] float16: many are kept at a time.
    """
    return sample(image, xy[:, None, None] + spacing * _grid(RADIUS + 1)).half()


def align_patches(
    image: Tensor, reference: Patches, affine: Tensor, start: Tensor, tolerance: float = CONVERGED
) -> Alignment:
    """Find patches in an image.

    Args:
        image: [H, W] grey values.
        reference: what is looked for.
        affine: [N, 2, 2] from pixels of the patch to pixels of the image.
        start: [N, 2] pixels of the image where they are expected, to within a few pixels of the patch.
        tolerance: pixels of the patch; one has arrived when it steps less.
    """
    weight = _weights()
    # Patches that show nothing keep a matrix that can be inverted; their uncertainty says what they are.
    ridge = 1e-6 * torch.eye(2)
    descent = torch.linalg.inv(reference.precision + ridge) @ (reference.gradient * weight[:, None]).transpose(1, 2)
    xy, last = start.clone(), torch.full((len(start),), torch.inf)
    offsets = _grid(RADIUS).reshape(-1, 2) @ affine.transpose(1, 2)  # [N, K, 2]
    for _ in range(MAX_ITERATIONS):
        moving = (last > tolerance).nonzero()[:, 0]
        if not len(moving):
            break
        seen, _ = _normalised(sample(image, xy[moving, None] + offsets[moving]))
        gain = (weight * seen * reference.values[moving]).sum(dim=1).clamp(min=0.2)
        step = (descent[moving] @ seen[:, :, None])[:, :, 0] / gain[:, None]
        length = step.norm(dim=1, keepdim=True)
        step = step * (MAX_STEP / length.clamp(min=MAX_STEP))
        # The patch was moved against the reference, so the place moves the other way.
        xy[moving] -= (affine[moving] @ step[:, :, None])[:, :, 0]
        last[moving] = length[:, 0]
    seen, _ = _normalised(sample(image, xy[:, None] + offsets))
    correlation = (weight * seen * reference.values).sum(dim=1)
    residual = (1 - correlation.square()).clamp(min=0) / correlation.square().clamp(min=1e-6)
    effective = 1 / weight.square().sum()
    worst = torch.linalg.eigvalsh(reference.precision)[:, 0].clamp(min=1e-9)
    return Alignment(
        xy=xy,
        correlation=correlation,
        uncertainty=(residual / (effective * worst)).sqrt(),
        converged=last <= tolerance,
    )


def _normalised(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] with weighted mean 0 and variance 1, and the standard deviation [N] that they had."""
    weight = _weights()
    centred = values - (weight * values).sum(dim=1, keepdim=True)
    deviation = (weight * centred.square()).sum(dim=1).sqrt().clamp(min=_FLAT)
    return centred / deviation[:, None], deviation


def _grid(reach: int) -> Tensor:
    """[2 reach + 1, 2 reach + 1, 2] steps from the centre of a patch as (x, y)."""
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], dim=-1)


def _weights() -> Tensor:
    """[K] of the pixels of a patch; they sum to one."""
    weight = torch.exp(-_grid(RADIUS).square().sum(dim=-1).flatten() / (2 * (0.6 * RADIUS) ** 2))
    return weight / weight.sum()
