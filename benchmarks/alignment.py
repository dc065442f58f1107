"""Alignment of pointmaps: all edges at once and second order, against a plain loop over edges with Adam, in one run.

    python benchmarks/alignment.py [--plain-steps 300] [--large] [--threads 2]

The scene is a hilly ground seen from above by a grid of tilted cameras. Its canonical pointmaps err as a network's do:
1 % of smooth noise in depth, a scale of their own (20 %), focal lengths 3 % off; matches have half a pixel of noise,
are rounded to whole pixels, and 3 % of them are wrong, with little confidence. 260 matches an edge, 512×384 px, 3,072
anchors an image.

- 40 cameras and 300 edges, from the same start: the plain way takes 300 coarse and 300 fine steps of Adam (learning
  rates 0.07 and 0.014, cosine), each in Python loops over images and edges, on the same losses. Ours is timed until it
  converges; its last loss must not be above that of the plain way. The ratios are times per step and of the whole. A
  step of ours is one of second order, of which a few do.
- With 20 % of the edges replaced by nonsense: the errors of ours, to be compared with those without nonsense.
- With --large, 1,000 cameras and 14,000 edges: minutes and peak memory, in place of the comparison.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

from mast3r_sfm.alignment.canonical import GRID_PX, cell_centres
from mast3r_sfm.alignment.coarse import CoarseLoss
from mast3r_sfm.alignment.losses import FineLoss
from mast3r_sfm.alignment.optimise import minimise
from mast3r_sfm.alignment.pointmaps import PointmapAlignment, PointmapOptions, align_pointmaps
from mast3r_sfm.alignment.problem import PointmapProblem, Scene
from mast3r_sfm.alignment.start import average_start, edge_similarities
from mast3r_sfm.geometry.rigid import angle_between_rotations, camera_centre, make_pose, rotation_from_axis_angle
from mast3r_sfm.geometry.similarity import align_similarity
from mast3r_sfm.types import Float64, Int64

WIDTH, HEIGHT, FOCAL = 512, 384, 460.0
MATCHES = 260
SPACING, ALTITUDE = 2.0, 10.0
RATES = (0.07, 0.014)
BARS = {"ratio_step": 10.0, "ratio_total": 20.0}


@dataclass(frozen=True, kw_only=True)
class World:
    """A hilly ground and the cameras above it."""

    cam_from_world: Float64
    """[N, 3, 4]."""
    focal_px: Float64
    """[N]."""
    waves: Float64
    """[W, 4] wave vector, phase and height of the hills."""

    def ground(self, xy: Float64) -> Float64:
        """Height [...] at places [..., 2]."""
        return (self.waves[:, 3] * np.sin(xy @ self.waves[:, :2].T + self.waves[:, 2])).sum(axis=-1)

    def cast(self, image: int, pixels: Float64) -> tuple[Float64, Float64]:
        """Points [M, 3] on the ground and depths [M] at pixels [M, 2] less the principal point."""
        pose = self.cam_from_world[image]
        ray = np.concatenate([pixels / self.focal_px[image], np.ones((len(pixels), 1))], axis=1) @ pose[:, :3]
        centre = camera_centre(pose)
        depth = np.full(len(ray), ALTITUDE)
        for _ in range(25):
            reached = (self.ground(centre[:2] + depth[:, None] * ray[:, :2]) - centre[2]) / ray[:, 2]
            depth = 0.5 * depth + 0.5 * reached
        return centre + depth[:, None] * ray, depth

    def project(self, image: int, points: Float64) -> Float64:
        """Pixels [M, 2] less the principal point."""
        local = points @ self.cam_from_world[image, :, :3].T + self.cam_from_world[image, :, 3]
        return np.asarray(self.focal_px[image] * local[:, :2] / local[:, 2:])


def make_world(cameras: int, rng: np.random.Generator) -> World:
    """Cameras on a grid, all looking down, more or less."""
    columns = int(np.ceil(np.sqrt(1.6 * cameras)))
    number = np.arange(cameras)
    centres = np.stack([number % columns, number // columns, np.zeros(cameras)], axis=1) * SPACING
    centres += rng.normal([0, 0, ALTITUDE], 0.3, (cameras, 3))
    tilt = rotation_from_axis_angle(np.concatenate([rng.normal(0, 0.25, (cameras, 2)), np.zeros((cameras, 1))], axis=1))
    rotation = tilt @ rotation_from_axis_angle(np.stack([0 * number, 0 * number, rng.uniform(-3, 3, cameras)], axis=1))
    rotation = rotation @ np.diag([1.0, -1.0, -1.0])
    vectors = rng.normal(0, 0.5, (8, 2))
    waves = np.concatenate([vectors, rng.uniform(0, 6, (8, 1)), np.full((8, 1), 0.3)], axis=1)
    pose = make_pose(rotation, -(rotation @ centres[:, :, None])[:, :, 0])
    return World(cam_from_world=pose, focal_px=FOCAL * np.exp(rng.normal(0, 0.02, cameras)), waves=waves)


def nearest_pairs(world: World, edges: int) -> Int64:
    """[E, 2] each image with its four nearest by the places that they look at, and then the nearest pairs of all."""
    count = len(world.focal_px)
    middle = np.array([world.cast(image, np.zeros((1, 2)))[0][0] for image in range(count)])
    first, second = np.triu_indices(count, 1)
    distance = np.linalg.norm(middle[first] - middle[second], axis=1)
    square = np.full((count, count), np.inf)
    square[first, second] = square[second, first] = distance
    rank = np.argsort(np.argsort(square, axis=1), axis=1)
    needed = np.minimum(rank[first, second], rank[second, first]) < 4
    chosen = np.sort(np.lexsort((distance, ~needed))[:edges])
    return np.stack([first[chosen], second[chosen]], axis=1)


def make_problem(world: World, pairs: Int64, rng: np.random.Generator, nonsense: float = 0.0) -> PointmapProblem:
    """What canonical views and matches say of the world, with their errors."""
    count, centre = len(world.focal_px), np.array([WIDTH, HEIGHT]) / 2
    scale, focal = np.exp(rng.normal(0, 0.2, count)), world.focal_px * np.exp(rng.normal(0, 0.03, count))
    ripples = rng.normal(0, 1, (count, 4, 4)) * [2 / WIDTH, 2 / WIDTH, 3, 0.7]

    def said(image: int, pixels: Float64) -> Float64:
        wave = ripples[image]
        noise = (wave[:, 3] * np.sin(np.pi * pixels @ wave[:, :2].T + wave[:, 2])).sum(axis=1)
        return np.asarray(scale[image] * world.cast(image, pixels)[1] * (1 + 0.01 * noise))

    rows, columns = cell_centres((HEIGHT, WIDTH), GRID_PX)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    depth = np.array([said(image, grid - centre) for image in range(count)])
    wrong = rng.random(len(pairs)) < nonsense
    pixels, anchors, offsets, weights = [], [], [], []
    for (first, second), is_wrong in zip(pairs, wrong, strict=True):
        one, other = match(world, int(first), int(second), rng)
        bad = rng.random(len(one)) < (1.0 if is_wrong else 0.03)
        other[bad] = rng.integers(0, [WIDTH, HEIGHT], (int(bad.sum()), 2))
        sides = ((int(first), one), (int(second), other))
        cells = [(xy[:, 1] // GRID_PX) * len(columns) + xy[:, 0] // GRID_PX for _, xy in sides]
        pixels.append(np.stack([xy - centre for _, xy in sides], axis=1))
        anchors.append(
            np.stack([cell + image * len(grid) for (image, _), cell in zip(sides, cells, strict=True)], axis=1)
        )
        values = [said(image, xy - centre) / depth[image, cell] for (image, xy), cell in zip(sides, cells, strict=True)]
        offsets.append(np.stack(values, axis=1))
        weights.append(np.where(bad & ~is_wrong, 0.3, rng.uniform(2, 20, len(one))))
    weight = np.concatenate(weights)
    return PointmapProblem(
        base_focal_px=focal,
        camera_of_image=np.arange(count, dtype=np.int32),
        known_focal_px=np.full(count, np.nan),
        image_of_anchor=np.repeat(np.arange(count), len(grid)),
        anchor_depth=depth.ravel(),
        pairs=pairs.astype(np.int32),
        start=np.concatenate([[0], np.cumsum([len(one) for one in weights])]),
        pixels=np.concatenate(pixels),
        anchor=np.concatenate(anchors),
        offset=np.concatenate(offsets),
        weight=weight / weight.mean(),
    )


def match(world: World, first: int, second: int, rng: np.random.Generator) -> tuple[Int64, Int64]:
    """Whole pixels [M, 2] of both images."""
    centre = np.array([WIDTH, HEIGHT]) / 2
    one = rng.integers(0, [WIDTH, HEIGHT], (3 * MATCHES, 2))
    points, _ = world.cast(first, one - centre)
    other = np.rint(world.project(second, points) + centre + rng.normal(0, 0.5, (len(one), 2))).astype(np.int64)
    seen = ((other >= 0) & (other < [WIDTH, HEIGHT])).all(axis=1)
    return one[seen][:MATCHES], other[seen][:MATCHES]


def errors(world: World, scene: Scene) -> dict[str, float]:
    """Mean errors after a similarity on the centres: degrees, percent of the longest baseline, percent of the focal."""
    truth, found = camera_centre(world.cam_from_world), camera_centre(scene.cam_from_world)
    fit = align_similarity(found, truth)
    turn = angle_between_rotations(scene.cam_from_world[:, :, :3] @ fit.rotation.T, world.cam_from_world[:, :, :3])
    span = float(np.linalg.norm(truth.max(axis=0) - truth.min(axis=0)))
    return {
        "rotation_deg": float(np.degrees(turn).mean()),
        "position_percent": 100 * float(np.linalg.norm(fit.apply(found) - truth, axis=1).mean()) / span,
        "focal_percent": 100 * float(np.abs(scene.focal_px / world.focal_px - 1).mean()),
    }


class Plain:
    """The losses in torch: a loop over the images for their points, and a loop over the edges; nothing is batched."""

    def __init__(self, problem: PointmapProblem, scene: Scene) -> None:
        tensor = torch.from_numpy
        count, cells = len(scene.log_scale), len(scene.log_depth) // len(scene.log_scale)
        self.pairs, self.total = problem.pairs.tolist(), float(problem.weight.sum())
        self.pose = tensor(scene.cam_from_world.copy())
        self.turn = [torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(count)]
        self.shift = [pose[:, 3].clone().requires_grad_() for pose in self.pose]
        self.log_scale = [tensor(np.array(value)).requires_grad_() for value in scene.log_scale]
        self.log_focal = [tensor(np.log(value)).requires_grad_() for value in scene.focal_px[:, None]]
        self.log_depth = [tensor(value.copy()).requires_grad_() for value in scene.log_depth.reshape(count, cells)]
        self.base, self.depth = tensor(problem.base_focal_px), tensor(problem.anchor_depth.reshape(count, cells))
        edge = problem.edge_of_match
        self.shown, self.slices = [], np.zeros((len(self.pairs), 2, 2), int)
        for image in range(count):
            sides = [np.flatnonzero(problem.pairs[edge, side] == image) for side in (0, 1)]
            values = [
                np.concatenate([one[rows, side] for side, rows in enumerate(sides)])
                for one in (problem.pixels, problem.anchor % cells, problem.offset)
            ]
            self.shown.append([tensor(value) for value in values])
            begin = 0
            for side, rows in enumerate(sides):
                for number, size in zip(*np.unique(edge[rows], return_counts=True), strict=True):
                    self.slices[number, side] = begin, begin + size
                    begin += size
        self.weight = [tensor(one) for one in np.split(problem.weight, problem.start[1:-1])]

    def parameters(self, *, fine: bool) -> list[Tensor]:
        """What a stage moves."""
        return [*self.turn, *self.shift, *self.log_scale, *(self.log_depth + self.log_focal if fine else [])]

    def rotations(self) -> list[Tensor]:
        """[3, 3] of every image."""
        return list((torch.linalg.matrix_exp(_skew(torch.stack(self.turn))) @ self.pose[:, :, :3]).unbind())

    def scene(self) -> Scene:
        """As the library has it."""
        with torch.no_grad():
            return Scene(
                cam_from_world=make_pose(torch.stack(self.rotations()).numpy(), torch.stack(self.shift).numpy()),
                log_scale=torch.stack(self.log_scale).numpy(),
                log_depth=torch.cat(self.log_depth).numpy(),
                focal_px=torch.cat(self.log_focal).exp().numpy(),
            )

    def points(self, rotations: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Depths [M] and points [M, 3] in the world of all matches of each image."""
        depths, points = [], []
        for image, (pixels, anchor, offset) in enumerate(self.shown):
            focal = self.log_focal[image].exp()
            depth = torch.exp(self.log_scale[image] + self.log_depth[image][anchor]) * self.depth[image][anchor]
            depth = depth * (1 + (offset - 1) * self.base[image] / focal)
            local = torch.cat([depth[:, None] * pixels / focal, depth[:, None]], dim=1)
            depths.append(depth)
            points.append((local - self.shift[image]) @ rotations[image])
        return depths, points

    def coarse(self) -> Tensor:
        """As CoarseLoss."""
        depths, points = self.points(self.rotations())
        total: Tensor | float = 0.0
        for pair, bounds, weight in zip(self.pairs, self.slices, self.weight, strict=True):
            (a, b), (c, d) = bounds
            depth = 0.5 * (depths[pair[0]][a:b] + depths[pair[1]][c:d])
            squared = ((points[pair[0]][a:b] - points[pair[1]][c:d]) ** 2).sum(dim=1) / depth**2
            total = total + (weight * 0.5 * 0.05**2 * torch.log1p(squared / 0.05**2)).sum()
        return total / self.total

    def fine(self) -> Tensor:
        """As FineLoss."""
        rotations = self.rotations()
        _, points = self.points(rotations)
        total = sum(0.5 * ((one / 0.05) ** 2).sum() for one in self.log_depth)
        total = total + sum(
            0.5 * ((one - base.log()) / 0.1) ** 2 for one, base in zip(self.log_focal, self.base, strict=True)
        )
        for pair, bounds, weight in zip(self.pairs, self.slices, self.weight, strict=True):
            for side in (0, 1):
                source, target, (a, b), (c, d) = pair[side], pair[1 - side], bounds[side], bounds[1 - side]
                seen = points[source][a:b] @ rotations[target].T + self.shift[target]
                pixel = self.log_focal[target].exp() * seen[:, :2] / seen[:, 2:].clamp(min=1e-3)
                squared = ((pixel - self.shown[target][0][c:d]) ** 2).sum(dim=1)
                total = total + (weight * 0.5 * torch.log1p(squared)).sum()
        return total / (2 * self.total)

    def descend(self, loss: Callable[[], Tensor], moved: list[Tensor], rate: float, steps: int) -> float:
        """Seconds for the steps."""
        optimiser = torch.optim.Adam(moved, lr=rate, betas=(0.9, 0.9))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
        begin = time.perf_counter()
        for _ in range(steps):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
            schedule.step()
        return time.perf_counter() - begin


def _skew(vector: Tensor) -> Tensor:
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).reshape(*vector.shape[:-1], 3, 3)


def plain_way(problem: PointmapProblem, start: Scene, steps: int) -> tuple[dict[str, float], Scene]:
    """Figures of the plain way, and its result."""
    plain = Plain(problem, start)
    coarse = plain.descend(plain.coarse, plain.parameters(fine=False), RATES[0], steps)
    fine = plain.descend(plain.fine, plain.parameters(fine=True), RATES[1], steps)
    return {
        "plain_coarse_step_seconds": coarse / steps,
        "plain_fine_step_seconds": fine / steps,
        "plain_seconds": coarse + fine,
    }, plain.scene()


def our_way(problem: PointmapProblem) -> tuple[dict[str, float], PointmapAlignment]:
    """Figures of ours, and its result."""
    begin = time.perf_counter()
    result = align_pointmaps(problem, PointmapOptions())
    seconds = time.perf_counter() - begin
    steps = [len(course.history) - 1 for course in result.courses]
    return {"our_seconds": seconds, "our_coarse_steps": sum(steps[:2]), "our_fine_steps": sum(steps[2:])}, result


def seconds_per_step(problem: PointmapProblem, start: Scene, coarse: Scene) -> dict[str, float]:
    """Of each stage of ours, the choice of the damping included."""
    options, found = PointmapOptions(), {}
    for name, loss, scene in (
        ("our_coarse_step_seconds", CoarseLoss(problem, options.coarse_kernels[-1]), start),
        ("our_fine_step_seconds", FineLoss(problem, options.fine_kernels_px[-1], options.priors), coarse),
    ):
        begin = time.perf_counter()
        _, course = minimise(loss, scene, replace(options.stopping, max_steps=4, least_decrease=-np.inf))
        found[name] = (time.perf_counter() - begin) / (len(course.history) - 1)
    return found


def compare(plain_steps: int) -> dict[str, Any]:
    """40 cameras and 300 edges, both ways."""
    rng = np.random.default_rng(0)
    world = make_world(40, rng)
    pairs = nearest_pairs(world, 300)
    problem = make_problem(world, pairs, np.random.default_rng(1))
    start, _ = average_start(problem, edge_similarities(problem))
    ours, result = our_way(problem)
    figures: dict[str, Any] = {**ours, **seconds_per_step(problem, start, result.coarse)}
    figures |= {f"our_{name}": value for name, value in errors(world, result.scene).items()}
    loss = FineLoss(problem, PointmapOptions().fine_kernels_px[-1], PointmapOptions().priors)
    figures["our_loss"] = loss.value(result.scene)
    noisy = make_problem(world, pairs, np.random.default_rng(1), nonsense=0.2)
    robust = align_pointmaps(noisy, PointmapOptions())
    figures |= {f"nonsense_{name}": value for name, value in errors(world, robust.scene).items()}
    figures["nonsense_edges_dropped"] = int((~robust.kept).sum())
    if plain_steps:
        plain, scene = plain_way(problem, start, plain_steps)
        figures |= plain | {f"plain_{name}": value for name, value in errors(world, scene).items()}
        figures["plain_loss"] = loss.value(scene)
        figures["ratio_coarse_step"] = plain["plain_coarse_step_seconds"] / figures["our_coarse_step_seconds"]
        figures["ratio_fine_step"] = plain["plain_fine_step_seconds"] / figures["our_fine_step_seconds"]
        figures["ratio_step"] = min(figures["ratio_coarse_step"], figures["ratio_fine_step"])
        figures["ratio_total"] = plain["plain_seconds"] / figures["our_seconds"]
        assert figures["our_loss"] <= figures["plain_loss"], "ours ended at a higher loss than the plain way"
    return figures


def large(cameras: int, edges: int) -> dict[str, Any]:
    """Time and memory of ours where the plain way would take days."""
    world = make_world(cameras, np.random.default_rng(0))
    problem = make_problem(world, nearest_pairs(world, edges), np.random.default_rng(1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures, result = our_way(problem)
    figures["minutes"] = figures["our_seconds"] / 60
    figures["prepared_peak_mb"] = before
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures | errors(world, result.scene) | {"edges_kept": int(result.kept.sum())}


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain-steps", type=int, default=300, help="0 leaves the plain way out")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--cameras", type=int, default=1000, help="with --large")
    parser.add_argument("--edges", type=int, default=14000, help="with --large")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    figures = large(options.cameras, options.edges) if options.large else compare(options.plain_steps)
    common.print_table(["figure", "value"], [[name, value] for name, value in figures.items()])
    common.print_json(
        {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
        | {"bars": BARS, "threads": options.threads}
    )


if __name__ == "__main__":
    if "--threads" not in sys.argv and "OMP_NUM_THREADS" not in os.environ:
        # NumPy's threads are set before it is loaded, so too late now.
        os.environ["OMP_NUM_THREADS"] = "2"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main(sys.argv[1:])
