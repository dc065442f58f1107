"""A dense PairModel that knows the truth, and errs exactly as much as it is told to.

It stands in for a network such as MASt3R in tests: its pointmaps, descriptors and confidences come from rendered views.
Everything it says of a pair depends on its seed and the pair's names only, never on the order of calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from mast3r_sfm.config import fingerprint
from mast3r_sfm.errors import ConfigError, InputError
from mast3r_sfm.geometry.rigid import compose_poses, invert_pose, transform_points
from mast3r_sfm.synthetic.covisibility import correspond
from mast3r_sfm.synthetic.render import View, render
from mast3r_sfm.synthetic.scene import Scene
from mast3r_sfm.types import (
    Encoding,
    Float32,
    Float64,
    LoadedImage,
    PairPrediction,
    PixelTransform,
    Preparation,
    ViewPrediction,
)

CODE_VERSION = 1
PATCH_PX = 16
_DESCRIPTOR = 24
_TOKEN = 64
_SEEN, _UNSEEN = 10.0, 1.5
"""Confidence of pixels that the other view sees, and of those that it does not."""
_WINDOWS_IN_MEMORY = 256
"""Rendered windows that are kept; another one costs a fraction of a second."""


@dataclass(frozen=True, kw_only=True)
class OracleNoise:
    """How wrong the oracle is. All zero: exact."""

    pixel_px: float = 0.0
    """Standard deviation of the place that a pixel's descriptor describes, per axis, in network pixels."""
    depth_relative: float = 0.0
    """Standard deviation of the relative error of depth, smooth over each view."""
    log_scale: float = 0.0
    """Standard deviation of the logarithm of a pair's scale."""
    log_focal: float = 0.0
    """Standard deviation of the logarithm of the error of the focal length that a pair's pointmaps imply."""
    outlier_pairs: float = 0.0
    """Share of pairs whose second view (by name) is taken for another place, consistently and confidently."""

    def __post_init__(self) -> None:
        for name in ("pixel_px", "depth_relative", "log_scale", "log_focal"):
            if getattr(self, name) < 0:
                raise ConfigError(f"OracleNoise.{name} = {getattr(self, name)}: must not be negative")
        if not 0 <= self.outlier_pairs <= 1:
            raise ConfigError(f"OracleNoise.outlier_pairs = {self.outlier_pairs}: must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class _Fourier:
    """Random Fourier features of world points: unit-length vectors, the more similar the nearer the points are.

    Rahimi and Recht, Random features for large-scale kernel machines, 2007.
    """

    frequencies: Float64
    """[3, D / 2]."""

    @classmethod
    def draw(cls, seed: int, dimensions: int, shortest: float, longest: float) -> _Fourier:
        """Frequencies whose lengths of correlation are spread between two bounds, in world units."""
        rng = np.random.default_rng([seed, dimensions])
        lengths = np.geomspace(shortest, longest, dimensions // 2)
        return cls(frequencies=rng.standard_normal((3, dimensions // 2)) / lengths)

    def embed(self, points: Float64) -> Float32:
        """[..., 3] to [..., D]."""
        phase = points @ self.frequencies
        features = np.concatenate([np.cos(phase), np.sin(phase)], axis=-1) / np.sqrt(phase.shape[-1])
        result: Float32 = features.astype(np.float32)
        return result


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What an encoding shows: a view, or a window of it."""

    name: str
    window: tuple[float, float, float, float] | None = None
    """Pixels of the window per pixel of the view, in x and y; the window's place of the view's first corner."""
    size: tuple[int, int] = (0, 0)
    """Of a window, in pixels."""

    @property
    def words(self) -> str:
        """As a part of what noise depends on."""
        return self.name if self.window is None else f"{self.name} {self.window} {self.size}"


class OracleModel:
    """Satisfies `mast3r_sfm.models.base.DenseModel`; may be shared by threads."""

    def __init__(
        self,
        views: Mapping[str, View],
        noise: OracleNoise | None = None,
        seed: int = 0,
        scene: Scene | None = None,
    ) -> None:
        """Keep the views and what is derived from them.

        Args:
            views: by image name; all of one size, which is the size of what the network sees. Photos may be larger,
                with the same shape.
            noise: how wrong it is; exact by default.
            seed: of the noise and the embeddings.
            scene: what the views show; with it, windows of photos can be encoded, which are rendered anew.

        Raises:
            InputError: no views, views of different or too small sizes, or outlier pairs among fewer than three views.
        """
        sizes = {(view.camera.width_px, view.camera.height_px) for view in views.values()}
        if len(sizes) != 1 or min(next(iter(sizes))) < PATCH_PX:
            raise InputError(
                f"an oracle needs views of one size, at least {PATCH_PX} px on each side, not {sorted(sizes)}"
            )
        self.noise = noise or OracleNoise()
        if self.noise.outlier_pairs > 0 and len(views) < 3:
            raise InputError("outlier pairs need at least three views: one is taken for another outside the pair")
        self.seed = seed
        self._views = dict(views)
        footprint = float(np.median([np.median(view.depth) / view.K[0, 0] for view in views.values()]))
        extent = _extent(views)
        self._descriptors = _Fourier.draw(seed, _DESCRIPTOR, 8 * footprint, max(extent, 16 * footprint))
        places = _Fourier.draw(seed, _TOKEN, extent / 12, extent / 2)
        self._tokens = {name: places.embed(_patch_centres(view)).astype(np.float16) for name, view in views.items()}
        self._places = places
        self._scene = scene
        # Views with equal tokens are the same photo twice; either name stands for both.
        self._seen_of_tokens = {_digest(tokens): _Seen(name=name) for name, tokens in self._tokens.items()}
        self._render = lru_cache(maxsize=_WINDOWS_IN_MEMORY)(self._render_window)
        poses = {name: view.cam_from_world.tolist() for name, view in views.items()}
        self.name = "oracle"
        self.images_at_once = 1
        self.pairs_at_once = 1
        self.fingerprint = fingerprint("oracle", CODE_VERSION, poses, sorted(sizes), self.noise, seed)
        self.preparation = Preparation(size_px=max(next(iter(sizes))))
        self.retrieval_tokens, self.token_channels = next(iter(self._tokens.values())).shape

    def encode(self, images: Sequence[LoadedImage]) -> list[Encoding]:
        """Describe images by the places that their patches of 16 px show; the pixels are not looked at.

        An image that is not the whole photo, by its size and transform, is taken for a window of it.

        Raises:
            InputError: an image is none of the oracle's views, is turned, or has another shape; or it is a window, and
                the oracle has no scene or the window is too small.
        """
        return [self._encode(image) for image in images]

    def predict(
        self, pairs: Sequence[tuple[Encoding, Encoding]]
    ) -> Iterator[tuple[int, PairPrediction, PairPrediction]]:
        """What is seen of each pair, with the noise of the pair in each order.

        Raises:
            InputError: an encoding that this oracle did not make.
        """
        for number, (first, second) in enumerate(pairs):
            yield number, self._predict(first, second), self._predict(second, first)

    def _predict(self, first: Encoding, second: Encoding) -> PairPrediction:
        seen = (self._recognise(first), self._recognise(second))
        rng = self._generator("pair", *(one.words for one in seen))
        pair = self._as_seen(*seen)
        scale = np.exp(self.noise.log_scale * rng.standard_normal())
        focal = np.exp(self.noise.log_focal * rng.standard_normal())
        points, confidence, descriptors = [], [], []
        for view, other in (pair, pair[::-1]):
            local = transform_points(view.cam_from_world, view.points_world)
            local = local * (1 + self.noise.depth_relative * _smooth_noise(rng, view.depth.shape))[..., None]
            first_from_view = compose_poses(pair[0].cam_from_world, invert_pose(view.cam_from_world))
            points.append(scale * transform_points(first_from_view, local) / np.array([focal, focal, 1.0]))
            confidence.append(np.where(correspond(view, other)[1], _SEEN, _UNSEEN))
            descriptors.append(self._describe(view, rng))
        return PairPrediction(
            first=_as_prediction(points[0], confidence[0], descriptors[0]),
            second=_as_prediction(points[1], confidence[1], descriptors[1]),
        )

    def is_outlier(self, first: str, second: str) -> bool:
        """Whether the oracle is wrong about a pair of images on purpose; the same for both orders."""
        draw = self._generator("outlier", *sorted((first, second))).random()
        return first != second and bool(draw < self.noise.outlier_pairs)

    def _encode(self, image: LoadedImage) -> Encoding:
        record = image.record
        view = self._views.get(record.name)
        if view is None:
            raise InputError(f"{record.name}: the oracle knows only {', '.join(sorted(self._views))}")
        camera = view.camera
        ratio = (record.width_px / camera.width_px, record.height_px / camera.height_px)
        if record.orientation != 1 or abs(ratio[0] * camera.height_px - record.height_px) > 1:
            raise InputError(
                f"{record.name}: {record.width_px}×{record.height_px} px, orientation {record.orientation}, does not "
                f"show the oracle's view of {camera.width_px}×{camera.height_px} px; give upright photos of that shape"
            )
        whole = PixelTransform(matrix=np.array([[ratio[0], 0.0, 0.0], [0.0, ratio[1], 0.0]]))
        if image.pixels.shape[:2] == view.depth.shape and np.allclose(image.transform.matrix, whole.matrix, atol=1e-6):
            return _encoding(view, self._tokens[record.name], whole)
        return self._encode_window(image, ratio)

    def _encode_window(self, image: LoadedImage, ratio: tuple[float, float]) -> Encoding:
        height, width = image.pixels.shape[:2]
        ((across, _, left), (_, down, top)) = image.transform.matrix.tolist()
        window = (ratio[0] / across, ratio[1] / down, -left / across, -top / down)
        seen = _Seen(name=image.record.name, window=window, size=(width, height))
        if min(width, height) < PATCH_PX:
            raise InputError(f"{seen.name}: a window of {width}×{height} px is too small; give {PATCH_PX} px at least")
        view = self._render(seen)
        tokens = self._places.embed(_patch_centres(view)).astype(np.float16)
        self._seen_of_tokens[_digest(tokens)] = seen
        return _encoding(view, tokens, image.transform)

    def _render_window(self, seen: _Seen) -> View:
        camera = self._views[seen.name].camera
        if self._scene is None or seen.window is None:
            raise InputError(
                f"{seen.name}: not the whole photo; give the oracle the scene, and it can render windows of the views"
            )
        across, down, x, y = seen.window
        window_from_view = np.array([[across, 0.0, x], [0.0, down, y], [0.0, 0.0, 1.0]])
        intrinsics = window_from_view @ camera.intrinsics
        width, height = seen.size
        return render(self._scene, replace(camera, intrinsics=intrinsics, width_px=width, height_px=height), samples=1)

    def _recognise(self, encoding: Encoding) -> _Seen:
        """What an encoding, which carries no name, came from: by its tokens, kept to the bit."""
        try:
            return self._seen_of_tokens[_digest(encoding.tokens)]
        except KeyError:
            raise InputError("this encoding was not made by this oracle; encode the photos again with it") from None

    def _as_seen(self, first: _Seen, second: _Seen) -> tuple[View, View]:
        """The pair's views, or what an outlier pair takes them for.

        The view that comes later by name is taken for a third one, in both orders. So the prediction is a rigid scene
        that passes every check of the pair by itself, as a repeated building does; only other pairs contradict it.
        """
        names = first.name, second.name
        if not self.is_outlier(*names):
            return self._view(first), self._view(second)
        mistaken = max(names)
        others = [name for name in sorted(self._views) if name not in names]
        rng = self._generator("stand-in", *sorted(names))
        stand_in = others[int(rng.integers(len(others)))]
        taken = (replace(seen, name=stand_in) if seen.name == mistaken else seen for seen in (first, second))
        return self._view(next(taken)), self._view(next(taken))

    def _view(self, seen: _Seen) -> View:
        return self._views[seen.name] if seen.window is None else self._render(seen)

    def _describe(self, view: View, rng: np.random.Generator) -> Float32:
        """[H, W, D] unit descriptors of the surface points, moved in the image by the pixel noise."""
        shift = self.noise.pixel_px * rng.standard_normal((*view.depth.shape, 2))
        shift *= view.depth[..., None] / np.diag(view.K)[:2]
        return self._descriptors.embed(view.points_world + shift @ view.cam_from_world[:2, :3])

    def _generator(self, *words: str) -> np.random.Generator:
        digest = hashlib.sha256("\0".join((str(self.seed), *words)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _as_prediction(points: Float64, confidence: Float64, descriptors: Float32) -> ViewPrediction:
    xyz = torch.from_numpy(points.reshape(-1, 3).astype(np.float32))
    sure = torch.from_numpy(confidence.astype(np.float32))
    return ViewPrediction(
        descriptors=torch.from_numpy(descriptors),
        descriptor_confidence=sure,
        points_at=lambda index: (xyz[index], sure.flatten()[index]),
    )


def _encoding(view: View, tokens: NDArray[np.float16], transform: PixelTransform) -> Encoding:
    camera = view.camera
    rows, columns = camera.height_px // PATCH_PX, camera.width_px // PATCH_PX
    x, y = np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5)
    xy = transform.to_photo(PATCH_PX * np.stack([x.ravel(), y.ravel()], axis=-1))
    return Encoding(
        tokens=tokens,
        xy=xy.astype(np.float32),
        attention=_contrast(view),
        transform=transform,
        network_size=(camera.width_px, camera.height_px),
    )


def _digest(tokens: NDArray[np.float16]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).digest()


def _extent(views: Mapping[str, View]) -> float:
    """Size of what the views show, in world units; far backdrops do not count."""
    points = np.concatenate([view.points_world[::8, ::8].reshape(-1, 3) for view in views.values()])
    low, high = np.percentile(points, [10, 90], axis=0)
    return float(np.linalg.norm(high - low))


def _patches(values: Float64) -> Float64:
    """[H, W, C] to [h·w, 16·16, C], row by row; a rest at the right and at the bottom is left out."""
    rows, columns = values.shape[0] // PATCH_PX, values.shape[1] // PATCH_PX
    cut = values[: rows * PATCH_PX, : columns * PATCH_PX].reshape(rows, PATCH_PX, columns, PATCH_PX, -1)
    return cut.transpose(0, 2, 1, 3, 4).reshape(rows * columns, PATCH_PX**2, -1)


def _patch_centres(view: View) -> Float64:
    """[h·w, 3] median world point of each patch: on a surface even where the patch shows two."""
    return np.median(_patches(view.points_world), axis=1)


def _contrast(view: View) -> Float32:
    """[h·w] how much a patch has to show: deviation of its grey values, never zero."""
    grey = _patches(view.image.astype(np.float64)).mean(axis=-1)
    result: Float32 = (grey.std(axis=-1) + 1).astype(np.float32)
    return result


def _smooth_noise(rng: np.random.Generator, size: tuple[int, ...]) -> Float64:
    """[H, W] normal noise that changes over about a fifth of the image, of standard deviation about 1."""
    grid = torch.from_numpy(rng.standard_normal((1, 1, 6, 7)))
    smooth = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=True)
    result: Float64 = smooth[0, 0].numpy()
    return result
