"""Where a patch of one image lies in another, to a fraction of a pixel.

Inverse compositional alignment (Baker and Matthews, Lucas-Kanade 20 years on, 2004) of the translation alone, under an
affine map that is known from the geometry. Gain and offset of the brightness are projected out. All patches of an image
are aligned together. Of a patch, only the black squares of a chessboard are compared: the photos were smoothed, so that
the white ones say the same, and a place differs by 0.002 pixels.

Shape letters: N patches, K pixels of a patch that are compared, M pixels asked for, H W an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

RADIUS = 7
"""Half the side of a patch, which counts less towards its border."""
SPREAD = 0.6 * RADIUS
"""Standard deviation of the pixels' weights, in pixels of the patch."""
MAX_ITERATIONS = 10
CONVERGED, NEAR = 0.02, 0.1
"""Steps in pixels below which a patch has arrived, and is near enough to go on from on a finer level."""
MAX_STEP = 1.5
TOGETHER = 512
"""Patches that are aligned at a time: their pixels stay in the processor's cache."""
_FLAT = 1e-3
"""Standard deviation of the grey values, in 0..255, of a patch that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches as references of an alignment."""

    values: Tensor
    """[N, K] of weighted mean 0 and weighted variance 1."""
    gradient: Tensor
    """[N, 2, K] along x and y per pixel of the patch, without what a change of gain or offset explains."""
    precision: Tensor
    """[N, 2, 2] Gauss–Newton matrix of the translation: its inverse times the variance of the residuals is the
    covariance of the place."""

    @classmethod
    def prepare(cls, windows: Tensor) -> Patches:
        """From windows [N, side + 2, side + 2] of an image, as `cut_windows` gives them."""
        grey, side = windows.flatten(1), windows.shape[2]
        step = _compared()
        middle = (step[:, 1] + RADIUS + 1) * side + step[:, 0] + RADIUS + 1
        left, right, above, below = (grey[:, middle.long() + offset].float() for offset in (-1, 1, -side, side))
        values, deviation = _normalised(grey[:, middle.long()].float())
        gradient = torch.stack([right - left, below - above], dim=1) / (2 * deviation[:, None, None])
        weight = _weights()
        gradient = gradient - (gradient @ weight)[:, :, None]
        gradient = gradient - (gradient @ (weight * values)[:, :, None]) * values[:, None]
        return cls(values=values, gradient=gradient, precision=(weight * gradient) @ gradient.transpose(1, 2))


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
    image: Tensor,
    reference: Patches,
    affine: Tensor,
    start: Tensor,
    tolerance: float = CONVERGED,
    reach: float = math.inf,
) -> Alignment:
    """Find patches in an image.

    Args:
        image: [H, W] grey values.
        reference: what is looked for.
        affine: [N, 2, 2] from pixels of the patch to pixels of the image.
        start: [N, 2] pixels of the image where they are expected, to within a few pixels of the patch.
        tolerance: pixels of the patch; one has arrived when it steps less.
        reach: pixels of the image; one that is farther than that from where it was expected is given up.
    """
    weight, count = _weights(), len(start)
    # Patches that show nothing keep a matrix that can be inverted; their uncertainty says what they are.
    inverse = torch.linalg.inv(reference.precision + 1e-6 * torch.eye(2))
    found = [torch.zeros(0, 4)]
    for begin in range(0, count, TOGETHER):
        some = slice(begin, begin + TOGETHER)
        weighted = weight * reference.values[some]
        descent = inverse[some] @ (weight * reference.gradient[some])
        moving = _Moving(start[some], start[some], affine[some], weighted, descent)
        found.append(_descend(image, moving, tolerance, reach))
    all_found = torch.cat(found)
    xy, correlation, last = all_found[:, :2], all_found[:, 2], all_found[:, 3]
    residual = (1 - correlation.square()).clamp(min=0) / correlation.square().clamp(min=1e-6)
    # As many as if all pixels were compared, since the others say the same.
    full = torch.exp(-_grid(RADIUS).square().sum(dim=-1) / (2 * SPREAD**2))
    effective = full.sum().square() / full.square().sum()
    worst = torch.linalg.eigvalsh(reference.precision)[:, 0].clamp(min=1e-9)
    return Alignment(
        xy=xy,
        correlation=correlation,
        uncertainty=(residual / (effective * worst)).sqrt(),
        converged=last <= tolerance,
    )


class _Moving(NamedTuple):
    """Patches on their way."""

    start: Tensor
    """[M, 2] where they were expected."""
    xy: Tensor
    """[M, 2] where they are."""
    affine: Tensor
    """[M, 2, 2] from pixels of the patch to pixels of the image."""
    weighted: Tensor
    """[M, K] values of the reference, times the pixels' weights."""
    descent: Tensor
    """[M, 2, K] from values of mean 0 and deviation 1 to the step."""

    def only(self, rows: Tensor) -> _Moving:
        return _Moving(*(part[rows] for part in self))


def _descend(image: Tensor, moving: _Moving, tolerance: float, reach: float) -> Tensor:
    """[N, 4] pixels where patches were found, their correlation before the last step, and the length of that."""
    weight, steps = _weights(), _compared()
    found = torch.empty(len(moving.xy), 4)
    rows = torch.arange(len(moving.xy))
    offsets = steps @ moving.affine.transpose(1, 2)  # [M, K, 2]
    for _ in range(MAX_ITERATIONS):
        seen = sample(image, moving.xy[:, None] + offsets)
        seen -= (seen @ weight)[:, None]
        deviation = (seen.square() @ weight).sqrt().clamp(min=_FLAT)
        correlation = (seen * moving.weighted).sum(dim=1) / deviation
        step = (moving.descent @ seen[:, :, None])[:, :, 0] / (deviation * correlation.clamp(min=0.2))[:, None]
        length = step.norm(dim=1, keepdim=True)
        step = step * (MAX_STEP / length.clamp(min=MAX_STEP))
        # The patch was moved against the reference, so the place moves the other way.
        place = moving.xy - (moving.affine @ step[:, :, None])[:, :, 0]
        found[rows] = torch.cat([place, correlation[:, None], length], dim=1)
        going = ((length[:, 0] > tolerance) & ((place - moving.start).norm(dim=1) < reach)).nonzero()[:, 0]
        if not len(going):
            break
        rows, offsets = rows[going], offsets[going]
        moving = moving._replace(xy=place).only(going)
    return found


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


def _compared() -> Tensor:
    """[K, 2] steps from the centre of a patch to the pixels that are compared: every other one, as on a chessboard."""
    steps = _grid(RADIUS).reshape(-1, 2)
    return steps[steps.sum(dim=1) % 2 == 0]


def _weights() -> Tensor:
    """[K] of the pixels that are compared; they sum to one."""
    weight = torch.exp(-_compared().square().sum(dim=1) / (2 * SPREAD**2))
    return weight / weight.sum()
