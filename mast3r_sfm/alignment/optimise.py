"""Levenberg–Marquardt over a loss of the alignment of pointmaps (Nocedal & Wright, Numerical Optimization, 2006, 10.3).

The matches are weighted anew in every step, as the loss's kernel has them (iteratively re-weighted least squares).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mast3r_sfm.alignment.coarse import CoarseLoss
from mast3r_sfm.alignment.losses import FineLoss, move
from mast3r_sfm.alignment.normal import PER_IMAGE, NormalEquations
from mast3r_sfm.alignment.problem import PointmapProblem, Scene
from mast3r_sfm.errors import DivergedError
from mast3r_sfm.types import Bool, Float64

MAX_LOG_STEP = 3.0
"""No step may make a scale, a depth or a focal length more than e³ times as large."""


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When to stop."""

    max_steps: int = 50
    least_decrease: float = 1e-4
    """Of the loss, relative, below which it has converged."""
    first_damping: float = 1e-4
    max_damping: float = 1e8


@dataclass(frozen=True, kw_only=True)
class Course:
    """How an optimisation went."""

    history: tuple[float, ...]
    """Loss at the start and after each step."""
    converged: bool
    """Whether the loss stopped falling, rather than the steps being used up."""


def gauge(problem: PointmapProblem) -> Bool:
    """Unknowns [P] held so that the world cannot drift: pose and scale of the image with the most matches."""
    counts = np.repeat(np.diff(problem.start), 2).astype(np.float64)
    root = int(np.bincount(problem.pairs.ravel(), counts, problem.num_images).argmax())
    fixed = np.zeros(PER_IMAGE * problem.num_images + problem.num_cameras, bool)
    fixed[PER_IMAGE * root : PER_IMAGE * (root + 1)] = True
    return fixed


def minimise(
    loss: CoarseLoss | FineLoss, scene: Scene, stopping: Stopping, held: Bool | None = None
) -> tuple[Scene, Course]:
    """Bring the loss down from a start until it falls no further.

    Args:
        loss: to be brought down.
        scene: the start.
        stopping: when to stop.
        held: [P] unknowns that stay; by default, those that `gauge` gives.

    Raises:
        DivergedError: the loss or a step is not finite; it names the step and the worst edges.
    """
    fixed = gauge(loss.problem) if held is None else held
    history = [loss.value(scene)]
    damping = stopping.first_damping
    while len(history) <= stopping.max_steps:
        equations = loss.linearise(scene, fixed)
        _check(loss, scene, history, equations.gradient)
        while True:
            trial = _try(loss, scene, equations, damping)
            value = np.inf if trial is None else loss.value(trial)
            if trial is not None and value < history[-1]:
                break
            damping = max(10 * damping, 1e-6)
            if damping > stopping.max_damping:
                return scene, Course(history=tuple(history), converged=True)
        scene, damping = trial, max(damping / 10, 1e-9)
        history.append(value)
        if history[-2] - value < stopping.least_decrease * history[-2]:
            return scene, Course(history=tuple(history), converged=True)
    return scene, Course(history=tuple(history), converged=False)


def _try(loss: CoarseLoss | FineLoss, scene: Scene, equations: NormalEquations, damping: float) -> Scene | None:
    """The scene after a step, or None where there is no such step."""
    try:
        step, depths = equations.solve(damping)
    except ArithmeticError:
        return None
    images = PER_IMAGE * loss.problem.num_images
    logarithms = np.concatenate([step[:images].reshape(-1, PER_IMAGE)[:, -1], step[images:], depths])
    if not np.isfinite(step).all() or not np.abs(logarithms).max(initial=0.0) < MAX_LOG_STEP:
        return None
    return move(loss.problem, scene, step, depths)


def _check(loss: CoarseLoss | FineLoss, scene: Scene, history: list[float], gradient: Float64) -> None:
    if np.isfinite(history[-1]) and np.isfinite(gradient).all():
        return
    worst = worst_edges(loss.problem, loss.residuals(scene))
    named = ", ".join(f"{first}–{second}" for first, second in loss.problem.pairs[worst].tolist())
    raise DivergedError(
        f"the alignment of the pointmaps ended in values that are not finite at step {len(history) - 1}; "
        f"the worst edges are {named}: look at these images, or leave them out"
    )


def worst_edges(problem: PointmapProblem, residuals: Float64, number: int = 5) -> list[int]:
    """The edges with the largest mean residual, those that are not finite first."""
    size = residuals.reshape(len(residuals), -1).mean(axis=1)
    mean = np.bincount(problem.edge_of_match, size, len(problem.pairs)) / np.diff(problem.start)
    return [int(edge) for edge in np.argsort(-np.nan_to_num(mean, nan=np.inf), kind="stable")[:number]]
