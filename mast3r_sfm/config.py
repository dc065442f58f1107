"""Every setting of the chain, typed, with units in the names.

One frozen dataclass per stage. What cannot change the result (device, threads, output folder) is in `RunOptions`, never
in `Config`, so that it never enters a cache key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mast3r_sfm.errors import ConfigError
from mast3r_sfm.settings import Untyped, build, read_toml, toml_value


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r}: must be finite")
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {rule}")


DecoderType = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which photos, and which of them share a camera."""

    cameras: Literal["auto", "single", "folder", "image"] = "auto"
    """Who shares intrinsics: photos of the same size and EXIF camera; all of one size; of one folder; nobody."""
    max_pixels: int = 512_000_000
    """A photo with more pixels than this is left out: decoding it would exhaust the memory."""
    mask_path: str = ""
    """Folder of masks, as COLMAP has them: mask_path/a/b.jpg.png for the photo a/b.jpg, or else a/b.png; where a mask
    is 0, its photo is not used. Empty: none."""

    def __post_init__(self) -> None:
        _require(self.max_pixels > 0, "prepare.max_pixels", self.max_pixels, "must be positive")


KEYPOINTS, MOST_KEYPOINTS = 4096, 8192
"""Of each image, in collections of ten photos and more, and in the smallest ones."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What the network sees."""

    model: str = "auto"
    """auto, xfeat, mast3r, other official weights, or the path of a checkpoint."""
    max_size_px: int = 0
    """Long side of the photo as the network sees it, at most; 0 = what suits the model (xfeat: 1024)."""
    keypoints: int = 0
    """Keypoints kept per image, the strongest first (models with keypoints); 0 = 4096, and up to 8192 of fewer than ten
    photos: four of a façade are placed three times as well, ten and more no better."""

    def __post_init__(self) -> None:
        _require(
            self.max_size_px == 0 or self.max_size_px >= 64,
            "encode.max_size_px",
            self.max_size_px,
            "must be 0 (auto) or at least 64",
        )
        _require(
            self.keypoints == 0 or self.keypoints >= 64,
            "encode.keypoints",
            self.keypoints,
            "must be 0 (auto) or at least 64",
        )

    def keypoints_of(self, num_images: int) -> int:
        """How many keypoints each image of a collection of `num_images` keeps."""
        return self.keypoints or min(max(10 * KEYPOINTS // max(num_images, 1), KEYPOINTS), MOST_KEYPOINTS)


PAIR_SOURCES = ("retrieval", "exhaustive", "sequential", "swin", "file", "gps")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Retrieval and the view graph."""

    source: str = "auto"
    """Where pairs come from: retrieval, exhaustive, sequential, swin, file, gps, or several of these, joined by commas;
    auto: exhaustive where that is no more work than retrieval could make, else retrieval."""
    file: str = ""
    """List of pairs for the source file: two names in each line."""
    window: int = 10
    """How many of the next photos the sources sequential and swin match each photo with."""
    keyframes: int = 0
    """Images picked by farthest-point sampling, all of whose pairs are matched; 0 = a fifth of the photos, from 8 to
    20."""
    neighbours: int = 10
    """Most similar images that every image is matched with, itself not counted."""
    retrieval: str = "auto"
    """What photos are compared by: collection: features and visual words that are learnt from them; the path of an
    official …_retrieval_trainingfree.pth with its codebook beside it; auto: the official files where they lie beside
    the checkpoint of the pointmap model in use and fit it, otherwise collection."""
    codebook_words: int = 0
    """Words of the codebook that is learnt from the collection; 0 = chosen from its size."""
    tokens_per_image: int = 0
    """Tokens of highest attention that describe an image to the retrieval; 0 = what suits the model, or what official
    files say."""

    second_round: bool = True
    """Match further pairs that the first ones make likely: of photos that have a match in common, and between parts of
    the collection. Not with the source file alone."""

    def __post_init__(self) -> None:
        _require(
            self.source == "auto" or set(self.sources) <= set(PAIR_SOURCES),
            "pairs.source",
            self.source,
            f"must be auto, or of {', '.join(PAIR_SOURCES)}, joined by commas",
        )
        has_file = "file" in self.sources
        _require(bool(self.file) or not has_file, "pairs.source", self.source, "needs pairs.file, a list of pairs")
        _require(not self.file or has_file, "pairs.file", self.file, "is read only if pairs.source names file")
        _require(self.window >= 1, "pairs.window", self.window, "must be at least 1")
        _require(self.keyframes >= 0, "pairs.keyframes", self.keyframes, "must be 0 (auto) or more")
        _require(self.neighbours >= 1, "pairs.neighbours", self.neighbours, "must be at least 1")
        _require(
            self.retrieval != "",
            "pairs.retrieval",
            self.retrieval,
            "must be auto, collection or the path of a .pth file",
        )
        _require(self.codebook_words >= 0, "pairs.codebook_words", self.codebook_words, "must be 0 (auto) or more")
        _require(
            self.tokens_per_image >= 0, "pairs.tokens_per_image", self.tokens_per_image, "must be 0 (auto) or more"
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The names in `source`; ("auto",) where it is left open."""
        return tuple(name.strip() for name in self.source.split(","))

    def keyframes_of(self, num_images: int) -> int:
        """How many keyframes a collection of `num_images` gets."""
        return self.keyframes or min(max(num_images // 5, 8), 20)


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Matching and the two-view check."""

    dtype: DecoderType = "auto"
    """What the decoder of a pointmap model computes in; auto: float16 on CUDA, float32 elsewhere."""
    features: Literal["auto", "model", "sift", "both"] = "auto"
    """What is matched: what the model finds, SIFT keypoints, or both; auto: the model's, and both where the
    connection of a keypoint model's photos hangs on too little."""
    resolution: Literal["auto", "coarse", "fine"] = "auto"
    """coarse: pointmap models match photos as they see them; fine: then once more in windows at full resolution, where
    photos are larger; auto: fine on CUDA for photos at least 1.5 times as large, else coarse."""
    min_similarity: float = 0.8
    """Cosine below which two of the model's keypoints are not a match."""
    max_ratio: float = 0.92
    """Distance of a match's descriptors over that of the second nearest above which it has no say in whether two photos
    show the same place (the model's keypoints)."""
    max_epipolar_error_px: float = 2.0
    """Sampson distance, at the resolution of matching, of an inlier of the two-view check."""
    min_inliers: int = 15
    """Distinct inliers of the two-view check below which two photos are never taken to show the same place."""
    chance_share: float = 0.12
    """Inliers that a pair needs beyond `min_inliers`, per distinct match: so many agree by chance."""
    time_budget_min: float = 0.0
    """Minutes after which no further pair is matched; the most similar ones come first. 0 = as many as it takes. With a
    budget, the result depends on the speed of the machine."""
    max_decode_disagreement_deg: float = 10.0
    """A pointmap model decodes a pair twice, once from each image; a pair whose rotations differ by more is weak.
    Measured with the oracle: up to 4.3 with 3 % of noise in depth or 10 % in focal length (9.2 where photos of a
    turning camera overlap little), up to 17 with 10 % in depth; 10 and more in scenes with depth where one decode is of
    another place, but less than 5 where these are flat."""

    def __post_init__(self) -> None:
        _require(-1 <= self.min_similarity <= 1, "match.min_similarity", self.min_similarity, "must be in [-1, 1]")
        _require(0 < self.max_ratio <= 1, "match.max_ratio", self.max_ratio, "must be in (0, 1]")
        _require(
            self.max_epipolar_error_px > 0, "match.max_epipolar_error_px", self.max_epipolar_error_px, "must be > 0"
        )
        _require(self.min_inliers >= 8, "match.min_inliers", self.min_inliers, "must be at least 8")
        _require(self.time_budget_min >= 0, "match.time_budget_min", self.time_budget_min, "must be 0 (none) or more")
        _require(0 <= self.chance_share <= 1, "match.chance_share", self.chance_share, "must be in [0, 1]")
        _require(
            0 < self.max_decode_disagreement_deg < 180,
            "match.max_decode_disagreement_deg",
            self.max_decode_disagreement_deg,
            "must be in (0, 180)",
        )


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Alignment of the pairs' points into one frame per component."""

    min_images: int = 2
    """A connected part with fewer images gets no model."""
    max_rotation_error_deg: float = 8.0
    """A pair whose rotation misses that of the whole by more is dropped."""
    max_direction_error_deg: float = 20.0
    """A pair whose baseline points this far away from the whole's is dropped (farther where its rays are parallel)."""
    start: Literal["averages", "maximum", "ward", "average", "single"] = "averages"
    """What the alignment of pointmaps starts from: averages over all pairs, the maximum spanning tree of their
    evidence, or the tree of a clustering by it. Where it does not hold all images, the maximum tree is tried."""

    def __post_init__(self) -> None:
        _require(self.min_images >= 2, "align.min_images", self.min_images, "must be at least 2")
        _require(
            0 < self.max_rotation_error_deg <= 180,
            "align.max_rotation_error_deg",
            self.max_rotation_error_deg,
            "must be in (0, 180]",
        )
        _require(
            0 < self.max_direction_error_deg <= 180,
            "align.max_direction_error_deg",
            self.max_direction_error_deg,
            "must be in (0, 180]",
        )


CameraModel = Literal[
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "OPENCV_FISHEYE",
]


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """Triangulation and bundle adjustment."""

    camera_model: CameraModel = "SIMPLE_RADIAL"
    """COLMAP's camera model of the result. Those of fisheyes are for photos of such lenses alone; until the mapper
    knows better, their pairs are checked as those of a pinhole camera, which loses some of the matches."""
    max_reprojection_error_px: float = 4.0
    """Observations farther than this from their point's projection are dropped, at the resolution of matching."""
    min_angle_deg: float = 1.5
    """Points whose rays meet at less than this angle are dropped."""

    refine: bool = True
    """Align the observations of each point between the photos, to a fraction of a pixel, and adjust once more."""
    mapper: Literal["align", "global", "incremental"] = "align"
    """What makes the models: ours, from aligned poses; or COLMAP's global or incremental one, on the same matches."""

    def __post_init__(self) -> None:
        _require(
            self.max_reprojection_error_px > 0,
            "map.max_reprojection_error_px",
            self.max_reprojection_error_px,
            "must be > 0",
        )
        _require(0 < self.min_angle_deg < 90, "map.min_angle_deg", self.min_angle_deg, "must be in (0, 90)")


ModelFormat = Literal["binary", "text", "colmap-3.8"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written, and how."""

    format: ModelFormat = "binary"
    """Of the models: COLMAP's binary or text files, or the three binary files of COLMAP 3.8 and what reads its models:
    the same cameras, images and points3D, without rigs and frames beside them."""


@dataclass(frozen=True, kw_only=True)
class KnownConfig:
    """Cameras and poses that are known beforehand."""

    intrinsics: str = ""
    """File of known cameras: a gt.json, a transforms.json, a COLMAP model, or its cameras.txt or cameras.bin alone."""
    intrinsics_mode: Literal["fixed", "prior"] = "fixed"
    """fixed: known cameras stay as they are; prior: focal length and distortion are refined from there."""
    intrinsics_of_groups: bool = False
    """Photos that the file does not name get the known camera of those that would share one with them."""
    poses: str = ""
    """File of known poses: a gt.json or a COLMAP model."""
    poses_mode: Literal["fixed", "prior"] = "fixed"
    """fixed: known poses stay as they are; prior: they say which pairs are wrong and where the world lies."""
    only_posed: bool = False
    """Photos whose pose is not known are left out."""

    def __post_init__(self) -> None:
        for name in ("intrinsics", "poses"):
            mode = getattr(self, f"{name}_mode")
            _require(
                bool(getattr(self, name)) or mode == "fixed", f"known.{name}_mode", mode, f"needs known.{name}, a file"
            )
        _require(
            bool(self.intrinsics) or not self.intrinsics_of_groups,
            "known.intrinsics_of_groups",
            self.intrinsics_of_groups,
            "needs known.intrinsics, a file",
        )
        has_poses = bool(self.poses)
        _require(has_poses or not self.only_posed, "known.only_posed", self.only_posed, "needs known.poses, a file")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings that can change a result."""

    seed: int = 0
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    map: MapConfig = field(default_factory=MapConfig)
    known: KnownConfig = field(default_factory=KnownConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2^31)")
        _require(
            self.map.mapper == "align" or not (self.known.intrinsics or self.known.poses),
            "map.mapper",
            self.map.mapper,
            "must be align where cameras or poses are known: COLMAP's mappers would not hold them",
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Config:
        """Build from nested tables, as TOML gives them. Unknown names and wrong types raise ConfigError."""
        config: Config = build(cls, values)
        return config

    @classmethod
    def from_toml(cls, path: Path) -> Config:
        """Read a TOML file with the tables [prepare] [encode] … and the key `seed`."""
        return cls.from_mapping(read_toml(path))

    def with_overrides(self, assignments: Iterable[str]) -> Config:
        """Apply `stage.key=value` texts, as `--set` gives them; values are parsed by the type of their setting.

        Raises:
            ConfigError: the text is no assignment, the name is unknown, or the value does not fit.
        """
        values = self.to_dict()
        for text in assignments:
            name, separator, value = text.partition("=")
            path = name.strip().split(".")
            if not separator:
                raise ConfigError(f"--set {text}: write it as stage.key=value, for example pairs.neighbours=5")
            table: Any = values
            for part in path[:-1]:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise ConfigError(f"--set {text}: {part} is a value, not a stage")
            table[path[-1]] = Untyped(value.strip())
        return Config.from_mapping(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries of the settings."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The settings as a TOML file that `from_toml` reads back to an equal Config."""
        lines = [f"seed = {self.seed}"]
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                lines += ["", f"[{name}]", *(f"{key} = {toml_value(entry)}" for key, entry in value.items())]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run, without influence on the result."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int = 0
    """CPU threads; 0 = all that this process may use."""
    tf32: bool = False
    """Let CUDA round float32 products to TF32: several times faster."""
    compiled: bool = False
    """Let torch.compile fuse the blocks of a pointmap model: slow to start, then faster; needs a C++ compiler."""
    resume: bool = True
    """Take finished parts of an earlier run from OUT/cache."""

    def __post_init__(self) -> None:
        _require(self.threads >= 0, "threads", self.threads, "must be 0 (all) or more")


def fingerprint(*parts: object) -> str:
    """sha256 (hex) of settings, hashes and version texts; equal values give equal fingerprints on every machine."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"cannot fingerprint {type(value).__name__}")

    text = json.dumps(parts, sort_keys=True, default=plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
