"""What a run says of itself: the records that reports and run.json are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mast3r_sfm.types import LeftOut


@dataclass(frozen=True, kw_only=True)
class RejectedPair:
    """A pair that matches well and contradicts the others: mostly two things that look alike."""

    first: str
    second: str
    """Names of the photos."""
    matches: int
    rotation_error_deg: float | None
    """By how much its rotation misses that between the photos' poses; None where nothing else ties them together."""
    direction_error_deg: float | None
    """The same of the direction of its baseline."""


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    """How well a registered image is held."""

    name: str
    edges: int
    """Pairs with other images that alignment placed it by; 0 where it was registered later, by its points."""
    residual_deg: float | None
    """Median angle by which these pairs miss its rotation; None without any."""
    observations: int
    mean_error_px: float
    """Of its observations' distances from their points' projections."""
    rotation_sigma_deg: float | None
    """Standard deviation by the independent errors of observations alone, over all axes; None where it was not asked
    for or is not determined."""
    position_sigma: float | None
    """The same of its place, over the largest distance between two cameras of the model."""
    weak: str = ""
    """Why its pose deserves distrust; empty where it does not."""


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """One reconstructed model, as written."""

    path: str
    """Relative to the output folder, for example sparse/0."""
    images: tuple[str, ...]
    """Names of the registered images."""
    points: int
    observations: int
    mean_track_length: float
    mean_reprojection_error_px: float
    mapper: str = "align"
    """What made it: align (ours), or COLMAP's global or incremental."""
    per_image: tuple[ImageSummary, ...] = ()
    """In the order of `images`."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What one stage did."""

    stage: str
    key: str
    seconds: float
    counts: dict[str, float]
    warnings: tuple[str, ...] = ()
    resumed: int = 0
    """Chunks that were found finished."""
    peak_memory_mb: float = 0.0
    """Peak resident memory of the process by the end of the stage."""


@dataclass(frozen=True, kw_only=True)
class PairsReport:
    """Which pairs were chosen to be matched."""

    num_images: int
    """Usable photos."""
    pairs: int
    kinds: dict[str, int]
    """Number of pairs by Reason, in small letters."""
    notes: tuple[str, ...]
    stages: tuple[StageReport, ...]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What `run.json` holds."""

    version: str
    versions: dict[str, str]
    model: str
    model_fingerprint: str
    config: dict[str, object]
    stages: tuple[StageReport, ...]
    models: tuple[ModelSummary, ...]
    num_images: int
    """Photos found, usable or not."""
    left_out: tuple[LeftOut, ...]
    rejected_pairs: tuple[RejectedPair, ...]
    """Verified pairs that alignment dropped, those with most matches first."""
    notes: tuple[str, ...]
    seconds: float
    error: str = ""
    """Why the run ended without a model; empty otherwise."""

    @property
    def num_registered(self) -> int:
        """Distinct photos that stand in any model."""
        return len({name for model in self.models for name in model.images})
