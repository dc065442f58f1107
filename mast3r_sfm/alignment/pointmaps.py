"""Alignment of pointmaps: start by averaging, coarse by distances in the world, fine by reprojection errors.

MASt3R-SfM (arXiv 2409.19152), section 4.3, with a start from the whole graph, edges that are dropped where they
contradict it, and a second-order solver.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mast3r_sfm.alignment.coarse import CoarseLoss
from mast3r_sfm.alignment.edges import components
from mast3r_sfm.alignment.losses import FineLoss, Priors
from mast3r_sfm.alignment.normal import PER_IMAGE
from mast3r_sfm.alignment.optimise import Course, Stopping, minimise
from mast3r_sfm.alignment.problem import PointmapProblem, Scene
from mast3r_sfm.alignment.start import average_start, edge_similarities, tree_start
from mast3r_sfm.alignment.tree import TreeKind
from mast3r_sfm.alignment.uncertainty import Deviations, deviations
from mast3r_sfm.errors import ReconstructionError
from mast3r_sfm.types import Bool, Float64, Int32


@dataclass(frozen=True, kw_only=True)
class PointmapOptions:
    """How pointmaps are aligned."""

    tree: TreeKind | None = None
    """Start along such a tree rather than from averages over all edges."""
    coarse_kernels: tuple[float, ...] = (0.2, 0.05)
    """Errors relative to depth at which the loss begins to level off, one after the other."""
    fine_kernels_px: tuple[float, ...] = (4.0, 1.0)
    move_depths: bool = True
    """Whether the fine stage moves the depths of anchors."""
    min_agreement: float = 0.25
    """Share of an edge's matches within three kernels, below which the edge is dropped."""
    priors: Priors = field(default_factory=Priors)
    stopping: Stopping = field(default_factory=Stopping)
    """Of the last kernel of a stage."""
    rough_decrease: float = 1e-2
    """Relative decrease of the loss at which the kernels before the last are done: the next one goes on from there."""


@dataclass(frozen=True, kw_only=True)
class PointmapAlignment:
    """The scene, and how much to believe of it."""

    scene: Scene
    coarse: Scene
    """After the coarse stage."""
    kept: Bool
    """[E] edges that agree with the whole."""
    placed: Bool
    """[N] images that such edges hold; poses of the others mean nothing."""
    residual_px: Float64
    """[N] median reprojection error of an image's matches; 0 for images that are not placed."""
    good_edges: Int32
    """[N]."""
    deviations: Deviations
    """Of the poses, by the noise of the matches."""
    courses: tuple[Course, ...]
    """One per kernel of either stage."""


def align_pointmaps(problem: PointmapProblem, options: PointmapOptions) -> PointmapAlignment:
    """Align the images of one connected problem.

    Raises:
        ReconstructionError: the edges do not connect the images.
        DivergedError: an optimisation ended in values that are not finite.
    """
    if len(components(problem.num_images, problem.pairs)) > 1:
        raise ReconstructionError("the pairs do not connect all images: align each connected part by itself")
    similar = edge_similarities(problem)
    scene, agrees = (
        average_start(problem, similar) if options.tree is None else tree_start(problem, similar, options.tree)
    )
    kept = agrees & (similar.support > options.min_agreement)
    courses: list[Course] = []
    for kernel, stopping in _schedule(options, options.coarse_kernels):
        kept, placed = _largest(problem, kept)
        loss = CoarseLoss(problem.with_edges(kept), kernel)
        scene, course = minimise(loss, scene, stopping)
        courses.append(course)
        # Of all edges: one that its own similarity spoke against may agree with the whole.
        kept = _agreement(problem, CoarseLoss(problem, kernel).residuals(scene), 3 * kernel) > options.min_agreement
    coarse = scene
    for kernel, stopping in _schedule(options, options.fine_kernels_px):
        kept, placed = _largest(problem, kept)
        fine = FineLoss(problem.with_edges(kept), kernel, options.priors, options.move_depths, near=scene)
        scene, course = minimise(fine, scene, stopping)
        courses.append(course)
        errors = FineLoss(problem, kernel, options.priors, options.move_depths).residuals(scene)
        kept = _agreement(problem, errors.max(axis=1), 3 * kernel) > options.min_agreement
    kept, placed = _largest(problem, kept)
    return PointmapAlignment(
        scene=scene,
        coarse=coarse,
        kept=kept,
        placed=placed,
        residual_px=_median_per_image(problem, errors, kept),
        good_edges=np.bincount(problem.pairs[kept].ravel(), minlength=problem.num_images).astype(np.int32),
        deviations=deviations(fine, scene, np.zeros(PER_IMAGE * problem.num_images + problem.num_cameras, bool)),
        courses=tuple(courses),
    )


def _schedule(options: PointmapOptions, kernels: tuple[float, ...]) -> list[tuple[float, Stopping]]:
    rough = replace(options.stopping, least_decrease=options.rough_decrease)
    return [*((kernel, rough) for kernel in kernels[:-1]), (kernels[-1], options.stopping)]


def _largest(problem: PointmapProblem, kept: Bool) -> tuple[Bool, Bool]:
    """Of the edges kept [E], those of the largest part that they connect, and its images [N]."""
    placed = np.zeros(problem.num_images, bool)
    placed[components(problem.num_images, problem.pairs[kept])[0]] = True
    if not placed[problem.pairs[kept]].all(axis=1).any():
        raise ReconstructionError("no pair of these images agrees with the others: take photos that overlap more")
    return kept & placed[problem.pairs].all(axis=1), placed


def _agreement(problem: PointmapProblem, residuals: Float64, bound: float) -> Float64:
    """[E] share of the matches with residuals [M] below the bound, by their weight."""
    edge = problem.edge_of_match
    total = np.bincount(edge, problem.weight, len(problem.pairs))
    below = np.bincount(edge, problem.weight * (residuals < bound), len(problem.pairs))
    return np.asarray(below / np.maximum(total, 1e-300))


def _median_per_image(problem: PointmapProblem, errors: Float64, kept: Bool) -> Float64:
    """[N] weighted by nothing: median over the matches of the image's edges of the error in the image."""
    inside = kept[problem.edge_of_match]
    image = problem.pairs[problem.edge_of_match[inside]][:, ::-1].ravel()
    value = errors[inside].ravel()
    order = np.lexsort((value, image))
    image, value = image[order], value[order]
    start = np.searchsorted(image, np.arange(problem.num_images + 1))
    middle = np.minimum((start[:-1] + start[1:]) // 2, len(value) - 1)
    return np.where(np.diff(start) > 0, value[middle], 0.0)
