"""The catalogue of official weights, where they are looked for, and how they are verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.weights import (
    CATALOGUE,
    Record,
    find_weights,
    hub_folder,
    mast3r_problem,
    official_weights,
    path_by_hand,
    verify_weights,
    weights_folder,
)
from tests.checkpoints import DUST3R, model_text, random_tensors, write_hub_folder, write_pth

LINEAR = "dust3r-512-linear"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights of this test's own."""
    folder = tmp_path / "weights"
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", str(folder))
    return folder


def install(name: str) -> Path:
    """Tiny weights in place of official ones, as a hub folder."""
    return write_hub_folder(hub_folder(official_weights(name)), DUST3R, random_tensors(DUST3R))


def test_where_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", "~/my weights")
    assert weights_folder() == tmp_path / "home" / "my weights"
    monkeypatch.setenv("MAST3R_SFM_WEIGHTS", "")
    assert weights_folder() == tmp_path / "xdg" / "mast3r-sfm" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert weights_folder() == tmp_path / "home" / ".cache" / "mast3r-sfm" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights_folder() == tmp_path / "home" / ".cache" / "mast3r-sfm" / "weights"


def test_the_catalogue(golden_dir: Path) -> None:
    spec = json.loads((golden_dir / "official_checkpoint_spec.json").read_text(encoding="utf-8"))
    names = {
        "mast3r": "mast3r_vitlarge_512_catmlpdpt_metric",
        "dust3r": "dust3r_vitlarge_512_dpt",
        "dust3r-512-linear": "dust3r_vitlarge_512_linear",
        "dust3r-224-linear": "dust3r_vitlarge_224_linear",
    }
    assert CATALOGUE.keys() == names.keys()
    for name, key in names.items():
        assert CATALOGUE[name].parameters == spec[key]["n_unique_params"]
        assert CATALOGUE[name].name == name


def test_addresses() -> None:
    mast3r, dust3r = official_weights("mast3r"), official_weights("dust3r")
    assert mast3r.repo == "naver/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric"
    assert mast3r.url.endswith("/ComputerVision/MASt3R/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth")
    assert dust3r.repo == "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"
    assert dust3r.url.endswith("/ComputerVision/DUSt3R/DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth")


@pytest.mark.parametrize("name", CATALOGUE)
def test_licence_notes_say_what_matters(name: str) -> None:
    note = CATALOGUE[name].license_note
    for part in ("CC BY-NC-SA 4.0", "Non-commercial", "Attribution", "Share alike", "Apache-2.0", "arXiv"):
        assert part in note
    assert ("map-free" in note) == (name == "mast3r")
    assert max(map(len, note.splitlines())) <= 120


def test_finding_weights(folder: Path) -> None:
    weights = official_weights("mast3r")
    assert find_weights("mast3r") is None
    assert "mast3r-sfm weights download mast3r" in mast3r_problem()
    assert "\n" not in mast3r_problem()
    # Half a download is none.
    hub_folder(weights).mkdir(parents=True)
    (hub_folder(weights) / "config.json").write_text("{}", encoding="utf-8")
    assert find_weights("mast3r") is None
    by_hand = folder / "MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth"
    by_hand.mkdir()
    assert find_weights("mast3r") is None
    by_hand.rmdir()
    by_hand.touch()
    assert find_weights("mast3r") == by_hand == path_by_hand(weights)
    assert mast3r_problem() == ""
    (hub_folder(weights) / "model.safetensors").touch()
    assert find_weights("mast3r") == hub_folder(weights)
    assert find_weights("dust3r") is None


def test_unknown_names() -> None:
    for function in (find_weights, official_weights):
        with pytest.raises(
            WeightsError, match=r"'dust3r-512-liner'; known: mast3r, dust3r, .*did you mean dust3r-512-linear"
        ):
            function("dust3r-512-liner")
    with pytest.raises(WeightsError, match=r"'x'; known: .*224-linear$"):
        find_weights("x")


def test_verifying_what_was_put_there_by_hand() -> None:
    found = verify_weights(str(install(LINEAR)))
    assert verify_weights(LINEAR) == found
    assert found.record is None
    assert found.sha256.keys() == {"config.json", "model.safetensors"}
    assert found.architecture.head == "linear"
    assert found.parameters == sum(tensor.numel() for tensor in random_tensors(DUST3R).values())


def test_verifying_an_official_file(folder: Path, tmp_path: Path) -> None:
    tensors = random_tensors(DUST3R)
    path = write_pth(tmp_path / "a.pth", model_text(DUST3R), tensors)
    count = sum(tensor.numel() for tensor in tensors.values())
    assert verify_weights(str(path)).parameters == count
    folder.mkdir()
    path.rename(path_by_hand(official_weights(LINEAR)))
    found = verify_weights(LINEAR)
    assert found.path.name == "DUSt3R_ViTLarge_BaseDecoder_512_linear.pth"
    assert list(found.sha256) == [found.path.name]
    one_decoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("dec_blocks2.")}
    shared = verify_weights(str(write_pth(tmp_path / "b.pth", model_text(DUST3R), one_decoder)))
    assert shared.parameters == sum(tensor.numel() for tensor in one_decoder.values()) < count


@pytest.mark.parametrize(("name", "count"), [("tiny_mast3r", 1421720), ("tiny_dust3r_dpt", 359384)])
def test_a_shared_tensor_counts_once(name: str, count: int, golden_dir: Path) -> None:
    assert verify_weights(str(golden_dir / f"{name}.safetensors")).parameters == count


def record_of(folder: Path, **changes: object) -> None:
    digests = verify_weights(str(folder)).sha256
    record = Record(
        name=LINEAR, repo="naver/x", revision="0" * 40, license="L", license_accepted="2026-01-01", sha256=digests
    )
    values = json.loads(record.to_json()) | changes
    (folder / "source.json").write_text(json.dumps(values), encoding="utf-8")


def test_verifying_against_the_record() -> None:
    folder = install(LINEAR)
    record_of(folder)
    found = verify_weights(LINEAR)
    assert found.record is not None
    assert found.record.sha256 == found.sha256
    assert verify_weights(str(folder / "model.safetensors")).record == found.record
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.safetensors is not what was downloaded: .* download again"):
        verify_weights(LINEAR)


def test_a_record_of_other_files_says_nothing() -> None:
    folder = install(LINEAR)
    record_of(folder)
    other = write_pth(folder / "other.pth", model_text(DUST3R), random_tensors(DUST3R))
    assert verify_weights(str(other)).record is None


@pytest.mark.parametrize("change", [{"sha256": 3}, {"sha256": {"model.safetensors": 3}}, {"more": 1}, {"repo": None}])
def test_a_broken_record_is_said(change: dict[str, object]) -> None:
    folder = install(LINEAR)
    record_of(folder, **change)
    with pytest.raises(WeightsError, match=r"source\.json, the record of a download, cannot be read"):
        verify_weights(LINEAR)
    (folder / "source.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"source\.json"):
        verify_weights(LINEAR)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(DUST3R)
    del tensors["enc_norm.bias"]
    tensors["more"] = tensors["mask_token"]
    tensors["enc_norm.weight"] = tensors["enc_norm.weight"][:3]
    path = write_pth(tmp_path / "a.pth", model_text(DUST3R), tensors)
    with pytest.raises(WeightsError, match=r"a\.pth.*enc_norm\.bias.*more.*enc_norm\.weight"):
        verify_weights(str(path))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="mast3r-sfm weights download mast3r"):
        verify_weights("mast3r")
    with pytest.raises(WeightsError, match="there is no file or folder"):
        verify_weights(str(tmp_path / "gone"))


def test_the_catalogue_waits_for_no_heavy_library() -> None:
    program = (
        "import sys; from mast3r_sfm.models.weights import mast3r_problem; mast3r_problem()\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
