"""What flows between the stages: frozen, keyword-only, validated on construction.

Shape letters: N images, P pairs, M matches, T tokens, H W pixels, C channels, D descriptor. Pixels are COLMAP's: the
centre of the top-left pixel is (0.5, 0.5). Photo pixels are those of the stored file, before its EXIF orientation is
applied, because that is how COLMAP reads photos and because one sensor then has one principal point.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from mast3r_sfm.errors import ShapeError

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


def _check(array: NDArray[np.generic], shape: tuple[int | None, ...], name: str) -> None:
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits:
        expected = ", ".join("*" if want is None else str(want) for want in shape)
        raise ShapeError(f"{name} has shape {array.shape}, expected [{expected}]")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ShapeError(f"{name} holds NaN or infinite values")


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One photo of the collection, as found on disk."""

    name: str
    """POSIX path relative to the image root."""
    width_px: int
    """Width of the stored pixels, before EXIF orientation."""
    height_px: int
    sha256: str
    orientation: int = 1
    """EXIF orientation 1–8."""
    exif_focal_px: float | None = None
    """Focal length in stored pixels, where EXIF tells it."""
    gps: tuple[float, float, float] | None = None
    """Latitude, longitude in degrees, altitude in metres."""
    camera_group: str = ""
    """Photos with the same text share intrinsics."""
    mask: str | None = None
    """POSIX path of the mask relative to the mask root, 0 = ignore."""
    mask_sha256: str = ""
    """Of the mask's file."""

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if not self.name or path.is_absolute() or ".." in path.parts:
            raise ShapeError(f"image name {self.name!r} must be a relative POSIX path inside the image root")
        if self.width_px < 1 or self.height_px < 1:
            raise ShapeError(f"{self.name}: size {self.width_px}×{self.height_px} px must be positive")
        if not 1 <= self.orientation <= 8:
            raise ShapeError(f"{self.name}: EXIF orientation {self.orientation} must be 1–8")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A photo that is not in the result, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The photos of one run, sorted by name; image i of every later type is `records[i]`."""

    root: Path
    records: tuple[ImageRecord, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        names = [record.name for record in self.records]
        if names != sorted(set(names)):
            raise ShapeError("records must be sorted by name, without duplicates")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in index order."""
        return tuple(record.name for record in self.records)


@dataclass(frozen=True, kw_only=True)
class PixelTransform:
    """Affine map from the pixels a network sees to the photo's own: xy_photo = matrix · (x, y, 1).

    Both sides count pixels as COLMAP does, centre of the first at (0.5, 0.5), so a pure resize is a pure scale.
    """

    matrix: Float64
    """[2, 3] photo_from_network."""

    def __post_init__(self) -> None:
        _check(self.matrix, (2, 3), "PixelTransform.matrix")
        if abs(np.linalg.det(self.matrix[:, :2])) < 1e-12:
            raise ShapeError("PixelTransform.matrix is not invertible")

    def to_photo(self, xy: Float64) -> Float64:
        """Network pixels [M, 2] to photo pixels [M, 2]."""
        return xy @ self.matrix[:, :2].T + self.matrix[:, 2]

    def to_network(self, xy: Float64) -> Float64:
        """Photo pixels [M, 2] to network pixels [M, 2]."""
        return np.asarray(np.linalg.solve(self.matrix[:, :2], (xy - self.matrix[:, 2]).T).T, dtype=np.float64)

    @property
    def scale(self) -> float:
        """Photo pixels per network pixel (geometric mean of both axes)."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a model wants its images; `images.framing` says what follows from it.

    Models without patches take photos as they are, only smaller. Models with patches were trained on images of one
    long side whose sides are multiples of the patch: their photos are enlarged, too, and cropped.
    """

    size_px: int
    """Long side of what the network sees, at most; with `square_crop`, its only side."""
    patch_px: int = 0
    """Side of the patches; 0: photos are only ever shrunk."""
    square_ok: bool = False
    """The network takes square images; otherwise they are cropped to 4:3. For models with patches."""
    square_crop: bool = False
    """The network takes nothing but square images: the short side is resized and the long one cropped to it."""

    def __post_init__(self) -> None:
        if self.patch_px < 0 or self.size_px < max(self.patch_px, 1):
            raise ShapeError(f"Preparation: patches of {self.patch_px} px do not fit into images of {self.size_px} px")
        if self.patch_px == 0 and (self.square_ok or self.square_crop):
            raise ShapeError("Preparation: square_ok and square_crop are for models with patches, set patch_px too")


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelMask:
    """Which pixels of a photo may be used; a bit each, so that many fit into memory."""

    bits: NDArray[np.uint8]
    """[H, ⌈W / 8⌉] of the stored photo, as numpy.packbits has them; 1: may be used."""
    width_px: int

    def __post_init__(self) -> None:
        _check(self.bits, (None, -(-self.width_px // 8)), "PixelMask.bits")

    @classmethod
    def of(cls, usable: Bool) -> PixelMask:
        """From an array [H, W] that is true where the photo may be used."""
        return cls(bits=np.packbits(usable, axis=1), width_px=usable.shape[1])

    def allows(self, xy: Float64) -> Bool:
        """Whether photo pixels [M, 2] may be used; what lies outside of the photo goes with its border."""
        # In float32, as database.db has keypoints: rounding may take one over the edge of a pixel.
        column, row = np.floor(xy.astype(np.float32)).astype(np.int64).reshape(-1, 2).T
        column, row = column.clip(0, self.width_px - 1), row.clip(0, len(self.bits) - 1)
        bit = (self.bits[row, column >> 3] >> (7 - (column & 7)).astype(np.uint8)) & 1
        return np.asarray(bit, np.bool_)


Usable = Callable[[int, Float64], Bool]
"""Whether photo pixels [M, 2] of the image of that number may be used [M]: its mask does not hide them."""


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """Pixels ready for a network, upright, and the way back to the photo."""

    record: ImageRecord
    pixels: NDArray[np.uint8]
    """[H, W, 3] sRGB, EXIF orientation applied, resized and cropped."""
    transform: PixelTransform
    mask: PixelMask | None = None
    """Of the stored photo: a model finds no keypoint where it says so. None: all of it may be used."""

    def __post_init__(self) -> None:
        _check(self.pixels, (None, None, 3), f"{self.record.name}: pixels")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One image after its single pass through the encoder.

    For a keypoint model, the tokens are the descriptors of its keypoints, strongest first. For a dense model they are
    the patch tokens in row-major order.
    """

    tokens: NDArray[np.float16]
    """[T, C]."""
    xy: Float32
    """[T, 2] photo pixels of each token."""
    attention: Float32
    """[T] importance of each token for retrieval, or the keypoint's score."""
    transform: PixelTransform
    network_size: tuple[int, int]
    """Width and height in pixels of what the network saw."""

    def __post_init__(self) -> None:
        count = len(self.tokens)
        _check(self.tokens, (count, None), "Encoding.tokens")
        _check(self.xy, (count, 2), "Encoding.xy")
        _check(self.attention, (count,), "Encoding.attention")


@dataclass(frozen=True, kw_only=True)
class ViewPrediction:
    """What a dense model says of one view of a pair; never stored. Torch tensors on the model's device."""

    descriptors: torch.Tensor
    """[H, W, D]."""
    descriptor_confidence: torch.Tensor
    """[H, W], positive."""
    points_at: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """[M] pixels (row · W + column) to their points [M, 3] in the first camera's frame, up to the pair's scale, and the
    confidence [M], at least 1, of these. A pointmap is dear and used at few pixels, so it never comes whole."""

    def __post_init__(self) -> None:
        if self.descriptors.ndim != 3 or self.descriptors.shape[:2] != self.descriptor_confidence.shape:
            raise ShapeError(
                f"ViewPrediction: descriptors {tuple(self.descriptors.shape)} and their confidence "
                f"{tuple(self.descriptor_confidence.shape)} must be [H, W, D] and [H, W]"
            )


@dataclass(frozen=True, kw_only=True)
class PairPrediction:
    """What a dense model says of a pair in one order; the first view is the reference frame."""

    first: ViewPrediction
    second: ViewPrediction
    euclidean: bool = False
    """Descriptors are compared by distance; otherwise they have unit length and are compared by their product."""


class Reason(enum.IntEnum):
    """Why a pair is in the view graph. The stored number is fixed."""

    KEYFRAME = 0
    NEAREST = 1
    NEIGHBOUR = 2
    BRIDGE = 3
    USER = 4
    EXHAUSTIVE = 5
    SEQUENCE = 6
    GPS = 7
    SECOND_ROUND = 8


@dataclass(frozen=True, kw_only=True)
class ViewGraph:
    """Which pairs of images are to be matched: i < j, unique, sorted."""

    num_images: int
    pairs: Int32
    """[P, 2]."""
    score: Float32
    """[P] similarity in [0, 1]."""
    reason: Int32
    """[P] values of Reason."""

    def __post_init__(self) -> None:
        count = len(self.pairs)
        _check(self.pairs, (count, 2), "ViewGraph.pairs")
        _check(self.score, (count,), "ViewGraph.score")
        _check(self.reason, (count,), "ViewGraph.reason")
        pairs = [tuple(pair) for pair in self.pairs.tolist()]
        if pairs != sorted(set(pairs)) or any(i >= j for i, j in pairs):
            raise ShapeError("ViewGraph.pairs must be sorted, unique and have i < j")
        if count and (self.pairs.min() < 0 or self.pairs.max() >= self.num_images):
            raise ShapeError(f"ViewGraph.pairs names an image outside 0..{self.num_images - 1}")


class Verdict(enum.StrEnum):
    """What the two-view check says of a pair."""

    GOOD = "good"
    """One rigid scene with parallax."""
    PLANAR = "planar"
    """One plane with parallax: the pose comes from a homography."""
    PURE_ROTATION = "pure rotation"
    """The same place seen from one centre: no depth."""
    WEAK = "weak"
    """Too small a share of the matches agrees, or the geometry is not trustworthy."""
    TOO_FEW = "too few matches"
    WATERMARK = "watermark"
    """What agrees was drawn over both photos, or moved with the camera: a logo, a frame, the bonnet of a car."""

    @property
    def is_link(self) -> bool:
        """Both photos show the same place."""
        return self in (Verdict.GOOD, Verdict.PLANAR, Verdict.PURE_ROTATION)

    @property
    def has_depth(self) -> bool:
        """The pair carries a relative pose with a baseline."""
        return self in (Verdict.GOOD, Verdict.PLANAR)


@dataclass(frozen=True, kw_only=True)
class PairMatches:
    """The verified matches of one edge of the view graph."""

    first: int
    second: int
    xy_first: Float64
    """[M, 2] photo pixels."""
    xy_second: Float64
    confidence: Float32
    """[M] larger is better."""
    points_first: Float64
    """[M, 3] the matched points in the first camera's frame, up to one scale per pair; [0, 3] without depth."""
    points_second: Float64
    """[M, 3] the same points in the second camera's frame, same scale."""
    verdict: Verdict
    inlier_ratio: float
    """Share of the putative matches that the check kept."""
    second_from_first: Float64 = field(default_factory=lambda: np.eye(3, 4))
    """[3, 4] relative pose, translation in the scale of the points; identity where the verdict has no pose."""
    decode_disagreement_deg: float = 0.0
    """Angle between the rotations that a pointmap model's two decodes of the pair imply; 0 for keypoint models."""

    def __post_init__(self) -> None:
        count = len(self.xy_first)
        if not 0 <= self.first < self.second:
            raise ShapeError(f"a pair must have 0 <= first < second, not ({self.first}, {self.second})")
        _check(self.xy_first, (count, 2), "PairMatches.xy_first")
        _check(self.xy_second, (count, 2), "PairMatches.xy_second")
        _check(self.confidence, (count,), "PairMatches.confidence")
        depth = count if self.verdict.has_depth else 0
        _check(self.points_first, (depth, 3), "PairMatches.points_first")
        _check(self.points_second, (depth, 3), "PairMatches.points_second")
        _check(self.second_from_first, (3, 4), "PairMatches.second_from_first")
        if not 0 <= self.decode_disagreement_deg <= 180:
            raise ShapeError(
                f"PairMatches.decode_disagreement_deg = {self.decode_disagreement_deg}: must be in [0, 180]"
            )

    def __len__(self) -> int:
        return len(self.xy_first)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Intrinsics of one camera, in COLMAP's models and parameter order."""

    model: str
    width_px: int
    height_px: int
    params: Float64
    """[K] COLMAP's order, for example f, cx, cy, k of SIMPLE_RADIAL."""
    focal_is_known: bool = False
    """The focal length comes from EXIF or the user, rather than from a guess."""
    is_given: bool = False
    """The user gave all of it: it keeps its model and starts from these parameters."""
    is_fixed: bool = False
    """The user gave it, and nothing changes it."""


@dataclass(frozen=True, kw_only=True)
class Rig:
    """The cameras of a collection and which image was taken with which."""

    cameras: tuple[Camera, ...]
    camera_of_image: Int32
    """[N] index into `cameras`."""

    def __post_init__(self) -> None:
        _check(self.camera_of_image, (None,), "Rig.camera_of_image")
        if len(self.camera_of_image) and self.camera_of_image.max() >= len(self.cameras):
            raise ShapeError("Rig.camera_of_image names a camera that does not exist")


@dataclass(frozen=True, kw_only=True)
class AlignmentResult:
    """Poses of one connected part of the collection, in a frame of its own."""

    images: Int32
    """[n] indices of the images placed, ascending."""
    edges: Int32
    """[E] numbers of the matches that it rests on; the others of these images contradict it."""
    cam_from_world: Float64
    """[n, 3, 4]."""
    residual_deg: Float64
    """[n] median disagreement of an image's edges with its pose, in degrees."""
    history: tuple[float, ...]
    """Value of the global loss after each iteration."""
    stop_reason: str
    focal_px: Float64 = field(default_factory=lambda: np.zeros(0))
    """[n] in photo pixels, as alignment found or left it, 0 of images of known pose that hold no pair; [0] where it did
    not look for it."""
    num_edges: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    """[n] how many of `edges` hold an image; [0] where nobody counted."""
    rotation_sigma_deg: Float64 = field(default_factory=lambda: np.zeros(0))
    """[n] standard deviation of the angle by which a pose may be turned, by the noise of the matches; [0]: unknown."""
    position_sigma: Float64 = field(default_factory=lambda: np.zeros(0))
    """[n] the same of the distance of its centre, in units of the frame; [0]: unknown."""

    def __post_init__(self) -> None:
        count = len(self.images)
        for name in ("focal_px", "num_edges", "rotation_sigma_deg", "position_sigma"):
            value = getattr(self, name)
            _check(value, (count if len(value) else 0,), f"AlignmentResult.{name}")
        _check(self.images, (count,), "AlignmentResult.images")
        _check(self.edges, (None,), "AlignmentResult.edges")
        _check(self.cam_from_world, (count, 3, 4), "AlignmentResult.cam_from_world")
        _check(self.residual_deg, (count,), "AlignmentResult.residual_deg")


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """The points of a model, and where images see them."""

    points: Float64
    """[K, 3] in the world."""
    point: Int64
    """[O] the point of each observation."""
    image: Int64
    """[O] number of its image."""
    keypoint: Int64
    """[O] number of its keypoint in the image."""
    xy: Float64
    """[O, 2] photo pixels."""

    def __post_init__(self) -> None:
        count = len(self.point)
        _check(self.points, (None, 3), "Tracks.points")
        for name, value in (("image", self.image), ("keypoint", self.keypoint), ("point", self.point)):
            _check(value, (count,), f"Tracks.{name}")
        _check(self.xy, (count, 2), "Tracks.xy")

    def joined(self, more: Tracks) -> Tracks:
        """The same points with further observations behind those that they have."""
        return Tracks(
            points=self.points,
            point=np.concatenate([self.point, more.point]),
            image=np.concatenate([self.image, more.image]),
            keypoint=np.concatenate([self.keypoint, more.keypoint]),
            xy=np.concatenate([self.xy, more.xy]),
        )
