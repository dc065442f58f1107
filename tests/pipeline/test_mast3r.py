"""The whole chain with tiny, random MASt3R and DUSt3R networks: what they say of a scene is nonsense, but it must be
carried through every step, be resumed, and end in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mast3r_sfm import encoding, pipeline
from mast3r_sfm.config import Config, RunOptions
from mast3r_sfm.errors import ReconstructionError, WeightsError
from mast3r_sfm.matching import check, putative, rounds
from mast3r_sfm.models.mast3r.model import Mast3rModel
from mast3r_sfm.report import read_report
from mast3r_sfm.storage import encodings as storage
from mast3r_sfm.storage.encodings import pack
from mast3r_sfm.summaries import RunReport
from mast3r_sfm.types import Encoding, PixelTransform
from tests.checkpoints import DUST3R, random_tensors, write_hub_folder
from tests.exact import Listener

PHOTOS = 4
SIZE = "encode.max_size_px=64"


@pytest.fixture(scope="module")
def photos(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the example, small, and one of them upright."""
    folder = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(sorted((repository / "examples" / "house" / "images").iterdir())[:PHOTOS]):
        with Image.open(path) as photo:
            photo.thumbnail((160, 160))
            (photo.crop((0, 0, 90, 120)) if number == 2 else photo).save(folder / path.name)
    return folder


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Two chunks of photos, three of pairs; and few matches, and no long search for a geometry that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "IMAGES_PER_CHUNK", 2)
        patch.setattr(storage, "IMAGES_PER_CHUNK", 2)
        patch.setattr(rounds, "PAIRS_PER_CHUNK", 2)
        patch.setattr(check, "MAX_ITERATIONS", 200)
        patch.setattr(putative, "MAX_SEEDS", 300)
        yield


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that ended in a ReconstructionError."""

    output: Path
    error: str
    listener: Listener

    @property
    def report(self) -> dict[str, Any]:
        """run.json."""
        value: dict[str, Any] = json.loads((self.output / "run.json").read_text(encoding="utf-8"))
        return value

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return {stage["stage"]: stage for stage in self.report["stages"]}

    @property
    def resumed(self) -> list[int]:
        """Chunks found finished, of encode, pairs and match."""
        return [self.stages[name]["resumed"] for name in ("encode", "pairs", "match")]

    def arrays(self, stage: str) -> list[dict[str, Any]]:
        """What a stage left on disk, chunk after chunk."""
        return [load_file(path) for path in sorted((self.output / "cache" / stage).rglob("*.safetensors"))]


def reconstruct(photos: Path, output: Path, model: Path, *settings: str) -> RunReport:
    config = Config().with_overrides([f"encode.model={model}", SIZE, *settings])
    return pipeline.reconstruct(photos, output, config, RunOptions(device="cpu", threads=1), Listener())


def run(photos: Path, output: Path, model: Path, *settings: str, threads: int = 1) -> Run:
    """Reconstruct, to the end that such a network leads to."""
    listener = Listener()
    config = Config().with_overrides([f"encode.model={model}", SIZE, *settings])
    with pytest.raises(ReconstructionError) as caught:
        pipeline.reconstruct(photos, output, config, RunOptions(device="cpu", threads=threads), listener)
    return Run(output=output, error=str(caught.value), listener=listener)


@pytest.fixture(scope="module")
def mast3r(golden_dir: Path) -> Path:
    return golden_dir / "tiny_mast3r.safetensors"


@pytest.fixture(scope="module")
def first_run(photos: Path, mast3r: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """For looking at."""
    return run(photos, tmp_path_factory.mktemp("out") / "first", mast3r)


def assert_same_files(one: Run, other: Run) -> None:
    for stage in ("encode", "pairs", "match"):
        for mine, theirs in zip(one.arrays(stage), other.arrays(stage), strict=True):
            assert mine.keys() == theirs.keys()
            for name, array in mine.items():
                np.testing.assert_array_equal(array, theirs[name], err_msg=f"{stage} {name}")


def test_every_step_is_taken_and_the_end_is_said(first_run: Run) -> None:
    report = first_run.report
    assert "no two photos were found to show the same place; take photos with more overlap" in first_run.error
    assert report["error"] == first_run.error
    assert report["model"] == "mast3r"
    assert len(report["model_fingerprint"]) == 64
    assert report["models"] == []
    assert report["num_images"] == PHOTOS
    assert report["config"]["match"]["dtype"] == "auto"
    assert list(first_run.stages) == ["prepare", "encode", "pairs", "match", "align"]
    assert first_run.stages["encode"]["counts"] == {"images": PHOTOS}
    assert first_run.stages["match"]["counts"]["pairs"] == PHOTOS * (PHOTOS - 1) / 2
    assert first_run.stages["match"]["counts"]["weak"] > 0  # there were matches, but no geometry
    assert first_run.resumed == [0, 0, 0]
    assert "model: mast3r" in first_run.listener.notes
    assert first_run.listener.steps == sum(total for _, total, _ in first_run.listener.started)
    assert first_run.listener.warnings == []
    assert not (first_run.output / "points.ply").exists()


def test_tokens_are_stored_in_half_precision(first_run: Run) -> None:
    chunks = first_run.arrays("encode")
    assert [len(chunk["length"]) for chunk in chunks] == [2, 2]
    sizes = np.concatenate([chunk["network_size"] for chunk in chunks])
    assert sorted(map(tuple, sizes.tolist())) == [(48, 64), *[(64, 48)] * 3]
    for chunk in chunks:
        assert chunk["tokens"].dtype == np.float16
        assert chunk["tokens"].shape == (chunk["length"].sum(), 32)
        np.testing.assert_array_equal(chunk["length"], chunk["network_size"].prod(axis=1) // 256)
    paths = (first_run.output / "cache" / "encode").rglob("*.safetensors")
    # Tokens of 64 bytes, pixel and importance of 12; the rest is the header.
    assert sum(path.stat().st_size for path in paths) < PHOTOS * 12 * (64 + 12) + 2 * 1000


def test_photos_keep_their_order_whatever_the_chunks_and_batches(
    first_run: Run, photos: Path, mast3r: Path, tmp_path: Path
) -> None:
    """Four photos in one chunk are encoded two at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "IMAGES_PER_CHUNK", 64)
        patch.setattr(storage, "IMAGES_PER_CHUNK", 64)
        found = run(photos, tmp_path / "out", mast3r)
    (chunk,) = found.arrays("encode")
    for name, array in chunk.items():
        expected = np.concatenate([part[name] for part in first_run.arrays("encode")])
        np.testing.assert_allclose(array, expected, rtol=2e-3, atol=2e-4, err_msg=name)


def test_the_tokens_of_a_thousand_photos() -> None:
    """The official network at 512 × 384: 1.58 GB."""
    count = 32 * 24
    encoding = Encoding(
        tokens=np.zeros((count, 1024), np.float16),
        xy=np.zeros((count, 2), np.float32),
        attention=np.zeros(count, np.float32),
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(512, 384),
    )
    arrays, _ = pack([encoding] * 4)
    assert 1.5e9 < 1000 / 4 * sum(array.nbytes for array in arrays.values()) < 1.6e9


@pytest.mark.parametrize("name", ["tiny_dust3r_dpt", "tiny_dust3r_linear"])
def test_dust3r_takes_every_step(name: str, golden_dir: Path, photos: Path, tmp_path: Path) -> None:
    found = run(photos, tmp_path / "out", golden_dir / f"{name}.safetensors")
    assert found.report["model"] == "dust3r"
    assert list(found.stages) == ["prepare", "encode", "pairs", "match", "align"]
    assert found.stages["match"]["counts"]["weak"] > 0


def test_a_second_run_does_nothing_again(
    first_run: Run, photos: Path, mast3r: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(first_run.output, tmp_path / "out")
    monkeypatch.setattr(Mast3rModel, "encode", None)
    monkeypatch.setattr(Mast3rModel, "predict", None)
    again = run(photos, output, mast3r)
    assert again.resumed == [2, 1, 3]
    assert again.error == first_run.error
    assert {name: stage["key"] for name, stage in again.stages.items()} == {
        name: stage["key"] for name, stage in first_run.stages.items()
    }


class Killed(BaseException):
    """As from outside: nothing may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """End the run at the n-th call of a method of the model."""
    original: Callable[..., Any] = getattr(Mast3rModel, name)
    calls = []

    def method(self: Mast3rModel, items: Any) -> Any:
        calls.append(items)
        if len(calls) == call:
            raise Killed
        return original(self, items)

    monkeypatch.setattr(Mast3rModel, name, method)


@pytest.mark.parametrize(("call", "finished"), [(1, 0), (2, 1)])
def test_a_run_killed_while_it_encodes_goes_on(
    first_run: Run, photos: Path, mast3r: Path, tmp_path: Path, call: int, finished: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "encode", call)
        with pytest.raises(Killed):
            reconstruct(photos, tmp_path / "out", mast3r)
    assert not (tmp_path / "out" / "run.json").exists()
    again = run(photos, tmp_path / "out", mast3r)
    assert again.resumed == [finished, 0, 0]
    assert_same_files(again, first_run)


@pytest.mark.parametrize(("call", "finished"), [(2, 0), (5, 2)])
def test_a_run_killed_while_it_matches_goes_on(
    first_run: Run, photos: Path, mast3r: Path, tmp_path: Path, call: int, finished: int
) -> None:
    """Two pairs make a chunk, and one at a time is decoded."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "predict", call)
        with pytest.raises(Killed):
            reconstruct(photos, tmp_path / "out", mast3r)
    assert not (tmp_path / "out" / "run.json").exists()
    again = run(photos, tmp_path / "out", mast3r)
    assert again.resumed == [2, 1, finished]
    assert_same_files(again, first_run)


def test_another_type_of_the_decoder_changes_the_matches_only(
    first_run: Run, photos: Path, mast3r: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(first_run.output, tmp_path / "out")
    again = run(photos, output, mast3r, "match.dtype=float16")
    assert again.resumed == [2, 1, 0]
    changed = [name for name, stage in again.stages.items() if stage["key"] != first_run.stages[name]["key"]]
    assert changed == ["match", "align"]
    assert again.report["model_fingerprint"] == first_run.report["model_fingerprint"]
    # What was computed before stays, for going back.
    assert len(list((output / "cache" / "match").iterdir())) == 2


def test_another_size_of_images_changes_the_tokens(first_run: Run, photos: Path, mast3r: Path, tmp_path: Path) -> None:
    output = shutil.copytree(first_run.output, tmp_path / "out")
    again = run(photos, output, mast3r, "encode.max_size_px=80")
    assert again.resumed == [0, 0, 0]
    assert again.stages["encode"]["key"] != first_run.stages["encode"]["key"]
    assert again.stages["prepare"]["key"] == first_run.stages["prepare"]["key"]


def test_other_weights_under_the_same_name_are_noticed(
    first_run: Run, photos: Path, mast3r: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(first_run.output, tmp_path / "out")
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"model{suffix}").write_bytes(mast3r.with_suffix(suffix).read_bytes())
    same = run(photos, output, tmp_path / "model.safetensors")
    assert same.resumed == [2, 1, 3]  # it is the content that counts
    fingerprint = same.report["model_fingerprint"]
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    other = run(photos, output, tmp_path / "model.safetensors")
    assert other.resumed == [0, 0, 0]
    assert other.report["model_fingerprint"] != fingerprint


def test_threads_change_nothing(first_run: Run, photos: Path, mast3r: Path, tmp_path: Path) -> None:
    found = run(photos, tmp_path / "out", mast3r, threads=3)
    assert [stage["key"] for stage in found.stages.values()] == [stage["key"] for stage in first_run.stages.values()]
    for mine, theirs in zip(found.arrays("match"), first_run.arrays("match"), strict=True):
        np.testing.assert_array_equal(mine["pairs"], theirs["pairs"])
        np.testing.assert_array_equal(mine["verdict"], theirs["verdict"])


def test_the_same_photo_twice_is_a_place_without_depth(photos: Path, tmp_path: Path) -> None:
    """With a network that treats both views alike, equal pixels match: a link, and all that follows from one."""
    tensors = random_tensors(DUST3R)
    alike = {
        name: 0.3 * tensors[name.replace("dec_blocks2", "dec_blocks").replace("head2", "head1")] for name in tensors
    }
    model = write_hub_folder(tmp_path / "model", DUST3R, alike)
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(sorted(photos.iterdir())[0]) as photo:
        photo.save(folder / "a.png")
        photo.save(folder / "b.png", compress_level=1)
    found = run(folder, tmp_path / "out", model, "encode.max_size_px=0")
    counts = found.stages["match"]["counts"]
    assert counts["pure rotation"] == counts["links"] == counts["pairs"] == 1
    assert "pure rotation: 2 photos show the same place, but all from one point" in found.error
    (chunk,) = found.arrays("match")
    assert chunk["has_points"].all()
    np.testing.assert_allclose(chunk["points_first"], chunk["points_second"], rtol=1e-4, atol=1e-4)


def test_broken_weights_end_the_run_in_words(photos: Path, tmp_path: Path) -> None:
    tensors = random_tensors(DUST3R)
    tensors["dec_blocks.1.norm3.bias"] = tensors["dec_blocks.1.norm3.bias"] + np.nan
    model = write_hub_folder(tmp_path / "model", DUST3R, tensors)
    with pytest.raises(WeightsError, match="dust3r gives NaN or infinite values: the weights are broken"):
        reconstruct(photos, tmp_path / "out", model)
    report = read_report(tmp_path / "out")
    assert "the weights are broken" in report["error"]
    assert [stage["stage"] for stage in report["stages"]] == ["prepare", "encode", "pairs", "match"]
