"""Reading checkpoints of all layouts, and refusing what is none or would have code run."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.mast3r.architecture import Architecture
from mast3r_sfm.models.mast3r.arguments import architecture_from
from mast3r_sfm.models.mast3r.checkpoint import find_files, read_checkpoint
from mast3r_sfm.models.mast3r.network import check_tensors
from tests.checkpoints import DPT, DUST3R, MAST3R, model_text, random_tensors, shared_names, write_hub_folder, write_pth

TEXT = model_text(DUST3R)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Of the tiny DUSt3R."""
    return random_tensors(DUST3R)


@pytest.fixture(scope="module")
def mast3r_tensors() -> dict[str, Tensor]:
    """Of the tiny MASt3R, with both names of shared tensors."""
    return random_tensors(MAST3R, DPT)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_official_pth(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = write_pth(tmp_path / "official.pth", TEXT, tensors)
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture == architecture_from(DUST3R)
    assert checkpoint.sha256 == sha256(path)
    assert_same(checkpoint.tensors, tensors)
    check_tensors(checkpoint.architecture, checkpoint.tensors)


def test_what_training_leaves_in_a_pth_does_not_matter(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.step(lambda: torch.tensor(0.0))
    extra = {
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
        "epoch": 7,
        "best_so_far": np.float64(0.25),
        "scores": [np.float32(1), np.int64(2), np.bool_(True)],
    }
    for new_format in (True, False):
        path = tmp_path / f"{new_format}.pth"
        stored = {"args": argparse.Namespace(model=TEXT), "model": tensors, **extra}
        torch.save(stored, path, _use_new_zipfile_serialization=new_format)
        assert_same(read_checkpoint(path).tensors, tensors)


def test_parameters_become_plain_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    found = read_checkpoint(write_pth(tmp_path / "p.pth", TEXT, parameters)).tensors  # type: ignore[arg-type]
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in found.values())
    assert_same(found, tensors)


def test_a_pth_that_was_packed_again_is_read_right(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = write_pth(tmp_path / "official.pth", TEXT, tensors)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    assert_same(read_checkpoint(packed).tensors, tensors)


def test_hub_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_hub_folder(tmp_path / "hub", DUST3R, tensors)
    assert "Infinity" in (folder / "config.json").read_text(encoding="utf-8")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.architecture == architecture_from(DUST3R)
    assert_same(checkpoint.tensors, tensors)
    assert read_checkpoint(folder / "model.safetensors").sha256 == checkpoint.sha256
    before = checkpoint.sha256
    (folder / "config.json").write_text(json.dumps({**DUST3R, "mlp_ratio": 4}), encoding="utf-8")
    assert read_checkpoint(folder).sha256 != before


@pytest.mark.parametrize("kept", ["by itself", "in the list"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_shared_tensors_get_both_names(
    kept: str, with_metadata: bool, tmp_path: Path, mast3r_tensors: dict[str, Tensor]
) -> None:
    shared = shared_names(mast3r_tensors)
    assert len(shared) == 8
    dropped = set(shared.values()) if kept == "by itself" else set(shared)
    stored = {name: tensor for name, tensor in mast3r_tensors.items() if name not in dropped}
    metadata = {other: name for name, other in shared.items()} if with_metadata and kept == "by itself" else {"a": "b"}
    path = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(stored, path, metadata)
    config = {"class_name": "AsymmetricMASt3R", "args": MAST3R, "dpt_overrides": DPT}
    path.with_suffix(".json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.tensors, mast3r_tensors)
    check_tensors(checkpoint.architecture, checkpoint.tensors)


def test_two_names_of_one_tensor_must_agree(tmp_path: Path, mast3r_tensors: dict[str, Tensor]) -> None:
    name = "downstream_head1.dpt.scratch.layer_rn.2.weight"
    changed = {**mast3r_tensors, name: mast3r_tensors[name] + 1}
    path = write_pth(tmp_path / "two.pth", model_text(MAST3R, "AsymmetricMASt3R"), changed)
    with pytest.raises(WeightsError, match=r"layer_rn\.2\.weight.*different values|different values"):
        read_checkpoint(path)


def test_one_decoder_serves_both_views(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    one = {name: tensor for name, tensor in tensors.items() if not name.startswith("dec_blocks2.")}
    checkpoint = read_checkpoint(write_pth(tmp_path / "one.pth", TEXT, one))
    check_tensors(checkpoint.architecture, checkpoint.tensors)
    copied = [name for name in checkpoint.tensors if name.startswith("dec_blocks2.")]
    assert len(copied) > 10
    for name in copied:
        assert checkpoint.tensors[name] is checkpoint.tensors[name.replace("dec_blocks2.", "dec_blocks.")]


def test_a_part_of_the_second_decoder_is_not_made_up(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    part = {name: tensor for name, tensor in tensors.items() if not name.startswith("dec_blocks2.1.")}
    checkpoint = read_checkpoint(write_pth(tmp_path / "part.pth", TEXT, part))
    with pytest.raises(WeightsError, match=r"missing: dec_blocks2\.1\."):
        check_tensors(checkpoint.architecture, checkpoint.tensors)


@pytest.mark.parametrize("name", ["tiny_mast3r", "tiny_dust3r_dpt", "tiny_dust3r_linear"])
def test_golden_models(name: str, golden_dir: Path) -> None:
    checkpoint = read_checkpoint(golden_dir / f"{name}.safetensors")
    check_tensors(checkpoint.architecture, checkpoint.tensors)
    stated = json.loads((golden_dir / f"{name}.json").read_text(encoding="utf-8"))
    assert checkpoint.architecture.decoder_depth == stated["args"]["dec_depth"]
    assert checkpoint.architecture.dpt_hooks == tuple(stated["dpt_hooks"])
    for other, kept in stated["shared_tensor_alias_to_stored_name"].items():
        assert torch.equal(checkpoint.tensors[other], checkpoint.tensors[kept])


def test_a_pth_is_mapped_and_not_copied(tmp_path: Path) -> None:
    big = {"mask_token": torch.zeros(20_000_000)}
    path = write_pth(tmp_path / "big.pth", TEXT, big)
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc: memory is not counted on this system")

    def private_kb() -> int:
        return int(status.read_text(encoding="ascii").split("RssAnon:")[1].split()[0])

    before = private_kb()
    found = read_checkpoint(path).tensors["mask_token"]
    assert found.sum() == 0
    assert private_kb() - before < 40_000


def pth_bytes(stored: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return buffer.getvalue()


ARGS = argparse.Namespace(model=TEXT)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "empty"),
        (b"just a text, and a long one at that\n", "not a file of weights"),
        (b"import os\nos.system('true')\n", "not a file of weights"),
        (b"  <!DOCTYPE html><title>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git LFS"),
        (bytes(range(256)) * 8, "not a file of weights"),
        (b"PK\x03\x04", "not a file of weights, or not whole"),
        (b"PK\x05\x06" + bytes(18), "not a file of weights"),
        (pth_bytes({"args": ARGS, "model": {}})[:-200], "not a file of weights, or not whole"),
        (pickle.dumps({}, protocol=2), "not a file of weights"),
        (pth_bytes([1, 2]), "something else"),
        (pth_bytes(torch.ones(3)), "something else"),
        (pth_bytes({}), "found: nothing"),
        (pth_bytes({"state": 1, "epoch": 2}), "found: epoch, state"),
        (pth_bytes({"a": torch.ones(1)}), "not the arguments of the network"),
        (pth_bytes({"args": argparse.Namespace(model=3), "model": {}}), "expected are 'args'"),
        (pth_bytes({"args": ARGS, "model": [torch.ones(1)]}), "expected are 'args'"),
        (pth_bytes({"args": ARGS, "model": {"a": 1}}), "'a' is not a tensor"),
        (pth_bytes({"args": ARGS, "model": {3: torch.ones(1)}}), "3 is not a tensor with a name"),
        (pth_bytes({"args": ARGS, "model": {"a": torch.ones(1, dtype=torch.int32)}}), "a is not a plain array"),
        (pth_bytes({"args": ARGS, "model": {"a": torch.ones(2, 2).to_sparse()}}), "a is not a plain array"),
        (pth_bytes({"args": ARGS, "model": {"a": torch.ones(2, device="meta")}}), "a is not a plain array"),
        (pth_bytes({"args": argparse.Namespace(model="CroCoNet()"), "model": {}}), "CroCoNet"),
        (pth_bytes({"args": argparse.Namespace(model="exit()"), "model": {}}), "exit"),
        (
            pth_bytes({"dune_backbone_name": "dune_vitbase_14", "mast3r_model_str": TEXT, "model": {}}),
            "seems to be a DUNE-MASt3R",
        ),
        (
            pth_bytes({"args": argparse.Namespace(pretrained="x", prewhiten=None, nfeat=300), "model": {}}),
            "seems to be the retrieval model",
        ),
        (
            pickle.dumps({"type": "Codebook", "params": {}, "state": {"centroids": np.ones((2, 2), np.float32)}}),
            "nothing of it was run",
        ),
    ],
)
def test_other_files_are_refused_and_say_what_they_are(data: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=part) as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_zip_without_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme.txt", "hello")
    with pytest.raises(WeightsError, match="not a file of weights, or not whole"):
        read_checkpoint(path)


def test_damaged_files_never_end_in_another_error(tmp_path: Path) -> None:
    data = bytearray(pth_bytes({"args": ARGS, "model": {"mask_token": torch.ones(4)}}))
    path = tmp_path / "weights.pth"
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = data.copy()
        for position in generator.integers(0, len(data), generator.integers(1, 6)):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged[: len(data) - generator.integers(0, 30)] if generator.random() < 0.3 else damaged)
        try:
            read_checkpoint(path)
        except WeightsError:
            refused += 1
    assert 100 < refused < 300


def test_paths_that_are_no_checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    def refused(path: Path, part: str) -> None:
        with pytest.raises(WeightsError, match=part) as raised:
            read_checkpoint(path)
        assert str(path) in str(raised.value)

    refused(tmp_path / "gone.pth", "there is no file or folder")
    refused(tmp_path / ("x" * 300), "cannot read")
    refused(tmp_path, r"no config\.json and no model\.safetensors: both files are needed$")
    folder = write_hub_folder(tmp_path / "hub", DUST3R, tensors)
    refused(folder / "config.json", "name the weights, or their folder")
    config = (folder / "config.json").rename(folder / "aside.json")
    refused(folder, r"no config\.json: both")
    refused(folder / "model.safetensors", r"put its configuration beside it, as model\.json or config\.json")
    config.rename(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refused(folder, "spread over several files")
    refused(folder / "model-00001-of-00002.safetensors", "spread over several files")
    (folder / "model-00001-of-00002.safetensors").unlink()
    write_pth(folder / "official.pth", TEXT, tensors)
    refused(folder, r"no model\.safetensors: both files are needed; or name a file in it, as .*official\.pth")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "does not describe a network"),
        (b" " * 1_000_001, "does not describe a network"),
        (b"{}", "lacks head_type"),
        (b'{"args": {}}', "lacks head_type"),
        (b'{"class_name": 3}', "class_name must be a text"),
        (b'{"args": {}, "dpt_overrides": [1]}', "dpt_overrides a mapping"),
        (json.dumps({**DUST3R, "head_type": "gs"}).encode(), "head_type='gs'"),
        (json.dumps({**DUST3R, "class_name": "CroCoNet"}).encode(), "CroCoNet"),
    ],
)
def test_wrong_configurations_are_explained(
    config: bytes, part: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_hub_folder(tmp_path / "hub", DUST3R, tensors)
    (folder / "config.json").write_bytes(config)
    with pytest.raises(WeightsError, match=part) as raised:
        read_checkpoint(folder)
    assert str(folder / "config.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_configuration_of_the_same_name_comes_first(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_hub_folder(tmp_path / "hub", DUST3R, tensors)
    mine = shutil.copy(folder / "model.safetensors", folder / "mine.safetensors")
    assert find_files(Path(mine)).config == folder / "config.json"
    (folder / "mine.json").write_text(json.dumps({**DUST3R, "img_size": 512}), encoding="utf-8")
    assert read_checkpoint(Path(mine)).architecture.image_size_px == 512
    assert read_checkpoint(folder).architecture.image_size_px == 224


@pytest.mark.parametrize("damage", ["cut off", "text", "empty", "git lfs"])
def test_broken_safetensors_are_explained(damage: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = write_hub_folder(tmp_path / "hub", DUST3R, tensors) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut off": data[: len(data) // 2],
            "text": b"nothing here",
            "empty": b"",
            "git lfs": b"version https://git-lfs.github.com/spec/v1",
        }[damage]
    )
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        read_checkpoint(path.parent)


def test_the_defaults_are_the_official_model() -> None:
    assert Architecture().descriptor_channels == 24
