"""The order of the stages, what each hands on, and the report of the run; the one module that knows all stages."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import mast3r_sfm
from mast3r_sfm.alignment import stage as align_stage
from mast3r_sfm.alignment.known import judge_pairs, report_contradictions, report_misfit
from mast3r_sfm.alignment.turning import align_turns
from mast3r_sfm.colmap.lens import Lens
from mast3r_sfm.colmap.mapper import MapperSettings
from mast3r_sfm.colmap.model import SPACES_IN_TEXT, ColmapModel, write_models
from mast3r_sfm.config import Config, MatchConfig, RunOptions, fingerprint
from mast3r_sfm.encoding import Encoder, torch_threads
from mast3r_sfm.errors import Mast3rSfmError, ReconstructionError
from mast3r_sfm.image_summaries import summarise_images
from mast3r_sfm.images.listing import list_images
from mast3r_sfm.images.loading import decode_photo, load_grey
from mast3r_sfm.images.masks import Masks, VisibleTokens
from mast3r_sfm.known import Known, known_keys, resolve_known
from mast3r_sfm.machine import usable_cpus
from mast3r_sfm.mapping import stage as map_stage
from mast3r_sfm.mapping.refinement import Refiner
from mast3r_sfm.matching import stage as match_stage
from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.matching.checker import PairChecker
from mast3r_sfm.matching.fine import FineMatcher, resolve_resolution
from mast3r_sfm.matching.putative import KeypointSource
from mast3r_sfm.models.base import DenseModel, ImageModel, PairModel
from mast3r_sfm.models.registry import checkpoint_path, load_model, resolve_device, resolve_name
from mast3r_sfm.models.sift import SiftModel
from mast3r_sfm.pairing import Pairing
from mast3r_sfm.progress import Progress, SilentProgress
from mast3r_sfm.reasons import describe_turns, rejected_pairs, say_turn, why_left_out, why_nothing
from mast3r_sfm.report import Recorder, StageDraft, versions
from mast3r_sfm.retrieval.official import OfficialRetrieval, resolve_retrieval
from mast3r_sfm.retrieval.picture import draw_pairs
from mast3r_sfm.retrieval.stage import ChosenPairs
from mast3r_sfm.storage.cache import StageCache, write_atomic, write_json
from mast3r_sfm.storage.encodings import NumberedEncodings, StoredEncodings
from mast3r_sfm.summaries import ModelSummary, PairsReport, RejectedPair, RunReport
from mast3r_sfm.types import (
    AlignmentResult,
    Encoding,
    ImageSet,
    LeftOut,
    PairMatches,
    Reason,
    Rig,
    Usable,
    Verdict,
    ViewGraph,
)

MAX_RECALIBRATIONS = 2
"""Times that pairs are calibrated anew: with ten unknown cameras, the first two gain almost all that there is."""


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
    run = _new_run(images, output, config, options, progress)
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


def choose_pairs(
    images: Path,
    output: Path,
    config: Config | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> PairsReport:
    """Decide which pairs of photos are to be matched, without matching them.

    Writes `output`/pairs.txt, two names in each line as COLMAP's matcher reads them, and `output`/pairs.png, a picture
    of the similarity matrix and of the graph. A later `reconstruct` with the same output and settings goes on from
    here.

    Args and errors as for `reconstruct`.
    """
    run = _new_run(images, output, config, options, progress)
    with torch_threads(run.threads):
        paired = run.find_pairs()
    names, graph = paired.photos.names, paired.chosen.graph
    lines = [f"{names[i]} {names[j]}\n" for i, j in graph.pairs]
    write_atomic(output / "pairs.txt", "".join(lines).encode())
    if any(" " in name for name in names):
        run.recorder.warn("names of photos have spaces, which COLMAP does not understand in pairs.txt; we do")
    picture = io.BytesIO()
    draw_pairs(paired.chosen).save(picture, "PNG")
    write_atomic(output / "pairs.png", picture.getvalue())
    return PairsReport(
        num_images=len(names),
        pairs=len(graph.pairs),
        kinds={reason.name.lower(): int((graph.reason == reason).sum()) for reason in Reason},
        notes=tuple(run.recorder.notes),
        stages=tuple(run.recorder.stages),
    )


def _new_run(
    images: Path, output: Path, config: Config | None, options: RunOptions | None, progress: Progress | None
) -> _Run:
    return _Run(
        images=images,
        output=output,
        config=config or Config(),
        options=options or RunOptions(),
        recorder=Recorder(progress or SilentProgress()),
    )


@dataclass
class _Run:
    """One run: the state that the stages hand on to each other, and the reports they leave."""

    images: Path
    output: Path
    config: Config
    options: RunOptions
    recorder: Recorder
    error: str = ""
    model_name: str = ""
    model_fingerprint: str = ""
    retrieval: OfficialRetrieval | None = None
    """What photos are compared by, where official files say it."""
    matching: MatchConfig = dataclasses.field(default_factory=MatchConfig)
    """As it is meant for the model and the device."""
    image_set: ImageSet | None = None
    known: Known | None = None
    left_out: tuple[LeftOut, ...] = ()
    models: tuple[ModelSummary, ...] = ()
    rejected_pairs: tuple[RejectedPair, ...] = ()
    masks: Masks | None = None
    """Of the photos; None where no photo has one."""

    @property
    def threads(self) -> int:
        return self.options.threads or usable_cpus()

    @property
    def usable(self) -> Usable | None:
        """Says which photo pixels may be used; None: all."""
        return None if self.masks is None else self.masks.usable

    def find_pairs(self) -> _Paired:
        """The stages up to the pairs that are to be matched."""
        with self.recorder.stage("prepare") as report:
            self.image_set = list_images(self.images, self.config.prepare, self.recorder)
            self.known = resolve_known(self.config.known, self.image_set, self.recorder)
            photos = self.image_set = self.known.photos
            self.left_out = photos.left_out
            self.masks = Masks.of(photos, self.config.prepare)
            report.key = fingerprint(self.config.prepare, [dataclasses.asdict(record) for record in photos.records])
            report.counts = {"photos": len(photos) + len(photos.left_out), "usable": len(photos)}
        model = self._load_model(len(photos))
        with self.recorder.stage("encode") as report:
            encodings = self._encode(photos, model, report)
        with self.recorder.stage("pairs") as report:
            chosen = self._choose_pairs(photos, encodings, model, report)
        return _Paired(photos=photos, model=model, encodings=encodings, chosen=chosen, known=self.known)

    def execute(self) -> None:
        """Run all stages in order."""
        paired = self.find_pairs()
        photos, model, encodings = paired.photos, paired.model, paired.encodings
        with self.recorder.stage("match") as report:
            matched = self._match(paired, report)
        with self.recorder.stage("align") as report:
            report.key = fingerprint(report.key, self.config.align, align_stage.CODE_VERSION)
            aligned = self._align_settled(paired, matched, report)
            matches, parts = aligned.matches, aligned.parts
            turns = self._find_turns(paired, matches, parts, aligned.rig)
            self.rejected_pairs = rejected_pairs(matches, parts, photos.names)
            report.counts |= {
                "parts": len(parts),
                "images": sum(len(part.images) for part in parts),
                "rejected pairs": len(self.rejected_pairs),
            }
        if not parts:
            raise ReconstructionError(why_nothing(matches, turns))
        with self.recorder.stage("map") as report:
            detected = not isinstance(model, DenseModel) or self.matching.features == "sift"
            given = map_stage.MapInput(
                names=photos.names,
                rig=aligned.rig,
                matches=matches,
                parts=parts,
                detected=detected,
                matched_px=1.0 if isinstance(model, DenseModel) and self.matching.resolution != "coarse" else None,
                known=paired.known.poses,
                usable=self.usable,
                confirmed=aligned.confirmed,
            )
            models = self._map(photos, given, encodings, report)
        with self.recorder.stage("export") as report:
            self._export(models, photos, matches, parts, report)

    def _load_model(self, num_images: int) -> PairModel:
        name = resolve_name(self.config.encode.model)
        model = load_model(
            name,
            device=self.options.device,
            dtype=self.config.match.dtype,
            tf32=self.options.tf32,
            compiled=self.options.compiled,
            config=dataclasses.replace(self.config.encode, keypoints=self.config.encode.keypoints_of(num_images)),
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

    def _encode(self, photos: ImageSet, model: ImageModel, report: StageDraft) -> StoredEncodings:
        encoder = Encoder(model=model, root=photos.root, records=photos.records, threads=self.threads, masks=self.masks)
        report.key = encoder.key
        encodings, report.resumed = encoder.encode("encode", self._cache("encode", encoder.key), self.recorder)
        report.counts = {"images": len(photos)}
        return encodings

    def _detect_sift(self, photos: ImageSet, images: Sequence[int]) -> KeypointSource:
        """The SIFT keypoints of some images."""
        model = SiftModel(threads=self.threads)
        records = [photos.records[image] for image in images]
        encoder = Encoder(model=model, root=photos.root, records=records, threads=self.threads, masks=self.masks)
        encodings, _ = encoder.encode("sift", self._cache("sift", encoder.key), self.recorder)
        return KeypointSource(
            encodings=NumberedEncodings(images, encodings),
            min_similarity=model.min_similarity,
            max_ratio=model.max_ratio,
        )

    def _choose_pairs(
        self, photos: ImageSet, encodings: Sequence[Encoding], model: PairModel, report: StageDraft
    ) -> ChosenPairs:
        pairing = Pairing(
            photos=photos,
            config=self.config.pairs,
            model_tokens=model.retrieval_tokens,
            seed=self.config.seed,
            threads=self.threads,
            official=self.retrieval,
        )
        report.key = pairing.key(report.key)
        visible = VisibleTokens(encodings, self.usable) if self.usable else encodings
        chosen, report.resumed = pairing.choose(visible, self._cache("pairs", report.key), self.recorder)
        report.counts = {
            "pairs": len(chosen.graph.pairs),
            **{reason.name.lower(): int((chosen.graph.reason == reason).sum()) for reason in Reason},
        }
        return chosen

    def _match(self, paired: _Paired, report: StageDraft) -> _Matched:
        photos, model, encodings = paired.photos, paired.model, paired.encodings
        # A finished pair is worth as much under any other budget; but with one, pairs come in another order.
        settings = dataclasses.replace(self.matching, time_budget_min=float(self.matching.time_budget_min > 0))
        report.key = fingerprint("match", match_stage.CODE_VERSION, report.key, settings, self.config.seed)
        if self.matching.features != "model":
            report.key = fingerprint(report.key, SiftModel().fingerprint)
        given = paired.known.cameras
        report.key = known_keys(report.key, paired.known.cameras_key)
        cache = self._cache("match", report.key)
        checker = PairChecker(
            model=model,
            encodings=encodings,
            config=self.matching,
            seed=self.config.seed,
            threads=self.threads,
            fine=self._fine_matcher(photos, model),
            lenses={
                image: Lens(camera=given[record.camera_group])
                for image, record in enumerate(photos.records)
                if record.camera_group in given
            },
            usable=self.usable,
        )
        matcher = match_stage.Matcher(
            checker=checker,
            num_images=len(photos),
            friends=max(self.config.pairs.neighbours // 3, 1),
            detect_sift=partial(self._detect_sift, photos),
        )
        # Keypoints are matched one pair per thread: torch's own threads would only get in the way.
        with torch_threads(self.threads if isinstance(model, DenseModel) else 1):
            edges, report.resumed = matcher.check_graph(
                paired.chosen.graph, cache, self.recorder, paired.chosen.reserve
            )
        self._judge_bridges(paired.chosen.graph, edges)
        rig = matcher.estimate_rig(edges, photos.records, given)
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
        return _Matched(
            matches=matches,
            rig=rig,
            calibrate=partial(matcher.calibrate, edges),
            join=partial(matcher.join, edges),
        )

    def _judge_bridges(self, graph: ViewGraph, edges: Sequence[EpipolarEdge]) -> None:
        """Say what became of the pairs that were matched only to join parts."""
        bridges = {tuple(pair) for pair in graph.pairs[graph.reason == Reason.BRIDGE].tolist()}
        failed = sum((edge.first, edge.second) in bridges and not edge.verdict.is_link for edge in edges)
        if bridges:
            self.recorder.note(
                f"{len(bridges) - failed} of {len(bridges)} bridges between parts that retrieval left apart hold"
            )

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
            self.usable,
        )

    def _align_settled(self, paired: _Paired, matched: _Matched, report: StageDraft) -> _Aligned:
        """Pairs are calibrated with guessed focal lengths at first, and anew while alignment finds others."""
        start, matches = matched.rig, matched.matches
        parts, rig = self._align(paired, matches, start, report)
        if paired.known.poses is not None:
            return _Aligned(matches=matches, parts=parts, rig=rig)
        for _ in range(MAX_RECALIBRATIONS):
            if not align_stage.focal_lengths_moved(start, rig):
                break
            anew = matched.calibrate(rig)
            others, other_rig = self._align(paired, anew, rig, report)
            if align_stage.agreeing_matches(others, anew) < align_stage.agreeing_matches(parts, matches):
                break
            start, matches, parts, rig = rig, anew, others, other_rig
        joined = matched.join(parts, rig)
        if joined:
            matches = [joined.get(number, match) for number, match in enumerate(matches)]
            parts, rig = self._align(paired, matches, start, report)
        confirmed = frozenset((match.first, match.second) for match in joined.values())
        return _Aligned(matches=matches, parts=parts, rig=rig, confirmed=confirmed)

    def _align(
        self, paired: _Paired, matches: Sequence[PairMatches], rig: Rig, report: StageDraft
    ) -> tuple[list[AlignmentResult], Rig]:
        """The parts, and the cameras with the focal lengths that alignment found."""
        poses = paired.known.poses
        scale = map_stage.photo_scale([encoding.transform.scale for encoding in paired.encodings])
        report.key = known_keys(report.key, paired.known.poses_key)
        if poses is not None:
            judged = judge_pairs(matches, poses, self.config.align)
            report_contradictions(judged, self.recorder)
            if poses.is_fixed:
                limit = self.matching.max_epipolar_error_px * scale
                report_misfit(matches, poses, rig, limit, self.recorder)
            report.counts = {"contradict known poses": int(judged.contradicts.sum())}
        own_depth = isinstance(paired.model, DenseModel) and self.matching.features != "sift"
        pinholes = align_stage.Pinholes(rig=rig, pixel_scale=scale, own_depth=own_depth)
        parts = align_stage.align(matches, len(paired.photos), self.config.align, pinholes, poses)
        return parts, align_stage.with_focal_lengths(rig, parts)

    def _find_turns(
        self, paired: _Paired, matches: Sequence[PairMatches], parts: Sequence[AlignmentResult], rig: Rig
    ) -> list[AlignmentResult]:
        """The parts without depth, all of whose photos were taken from one point, which go into rotations.json."""
        placed = np.concatenate([np.zeros(0, np.int32), *(part.images for part in parts)])
        scale = map_stage.photo_scale([encoding.transform.scale for encoding in paired.encodings])
        turns = align_turns(matches, placed, rig, scale, self.config.align)
        path = self.output / "rotations.json"
        if turns:
            write_json(path, {"parts": describe_turns(turns, paired.photos.names)})
        else:
            path.unlink(missing_ok=True)
        for turn in turns if parts else ():
            self.recorder.warn(say_turn(turn, paired.photos.names))
        return turns

    def _map(
        self, photos: ImageSet, given: map_stage.MapInput, encodings: Sequence[Encoding], report: StageDraft
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
            usable=self.usable,
        )
        with torch_threads(1):
            models = map_stage.build_models(
                database, given, settings, self.recorder, refiner if self.config.map.refine else None
            )
        report.counts = {"models": len(models), "images": sum(len(model.cam_from_world) for model in models)}
        if not models:
            raise ReconstructionError(
                "the photos' pairs agree, but too few of their points are consistent over several photos; "
                + (
                    "add photos with more overlap"
                    if not given.fixed_poses
                    else "poses that are only approximate must be given as such (--poses-prior)"
                )
            )
        return models

    def _export(
        self,
        models: list[ColmapModel],
        photos: ImageSet,
        matches: Sequence[PairMatches],
        parts: Sequence[AlignmentResult],
        report: StageDraft,
    ) -> None:
        for model in models:
            model.colour(photos.root)
        written = write_models(models, self.output / "sparse", self.config.export.format)
        self.models = tuple(
            dataclasses.replace(
                summary,
                mapper=self.config.map.mapper,
                per_image=summarise_images(model, parts, photos.names),
            )
            for summary, model in zip(written, models, strict=True)
        )
        if self.config.export.format == "text" and any(" " in name for name in photos.names):
            self.recorder.warn(SPACES_IN_TEXT)
        models[0].write_ply(self.output / "points.ply")
        if self.known is not None and (said := self.known.describe(self.models[0].images)):
            self.recorder.note(said)
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
            versions=versions(),
            model=self.model_name,
            model_fingerprint=self.model_fingerprint,
            config=self.config.to_dict(),
            stages=tuple(self.recorder.stages),
            models=self.models,
            num_images=len(photos) + len(photos.left_out) if photos else 0,
            left_out=tuple(sorted(self.left_out, key=lambda entry: entry.name)),
            rejected_pairs=self.rejected_pairs,
            notes=tuple(self.recorder.notes),
            seconds=seconds,
            error=self.error,
        )
        write_json(self.output / "run.json", dataclasses.asdict(report))
        return report


@dataclass(frozen=True, kw_only=True)
class _Paired:
    """What the stages up to the choice of pairs hand on."""

    photos: ImageSet
    model: PairModel
    encodings: StoredEncodings
    chosen: ChosenPairs
    known: Known


@dataclass(frozen=True, kw_only=True)
class _Matched:
    """What matching hands on."""

    matches: list[PairMatches]
    rig: Rig
    calibrate: Callable[[Rig], list[PairMatches]]
    """Gives all pairs anew, with better cameras."""
    join: Callable[[Sequence[AlignmentResult], Rig], Mapping[int, PairMatches]]
    """Gives the pairs that confirm each other once parts are aligned."""


@dataclass(frozen=True, kw_only=True)
class _Aligned:
    """What alignment hands on."""

    matches: list[PairMatches]
    """The pairs as they are believed in the end."""
    parts: list[AlignmentResult]
    rig: Rig
    """With the focal lengths of the parts."""
    confirmed: frozenset[tuple[int, int]] = frozenset()
    """Pairs by which parts were joined."""
