"""Files that would have code run when read, or would change something that the whole process shares."""

from __future__ import annotations

import argparse
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.mast3r.checkpoint import read_checkpoint
from mast3r_sfm.models.tensor_files import read_pickled
from tests.checkpoints import DUST3R, model_text, random_tensors, write_pth

TEXT = model_text(DUST3R)


class Malice:
    """Unpickled naively, it would call a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.arguments


class MyNamespace(argparse.Namespace):
    """Is a Namespace, and has code of its own."""

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["marker"]).touch()


def malices(marker: Path) -> dict[str, object]:
    return {
        "os.system": Malice(os.system, f"touch {marker}"),
        "builtins.eval": Malice(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "builtins.exec": Malice(exec, f"import os; os.mkdir({str(marker)!r})"),
        "os.mkdir": Malice(os.mkdir, str(marker)),
        "pathlib": Malice(Path.touch, marker),
        "getattr": Malice(getattr, Path, "touch"),
        "namespace": MyNamespace(marker=str(marker)),
    }


KINDS = sorted(malices(Path("marker")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["whole", "entry", "args", "args.model", "tensor"])
def test_files_that_would_run_code_are_refused_and_run_nothing(kind: str, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    malice = malices(marker)[kind]
    stored: object = {
        "whole": malice,
        "entry": {"args": argparse.Namespace(model=TEXT), "model": {"mask_token": torch.ones(3)}, "epoch": malice},
        "args": {"args": malice, "model": {}},
        "args.model": {"args": argparse.Namespace(model=malice), "model": {}},
        "tensor": {"args": argparse.Namespace(model=TEXT), "model": {"mask_token": malice}},
    }[place]
    written = []
    for protocol in (2, 4):
        written.append(tmp_path / f"zip{protocol}.pth")
        torch.save(stored, written[-1], pickle_protocol=protocol)
        written.append(tmp_path / f"old{protocol}.pth")
        torch.save(stored, written[-1], pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        written.append(tmp_path / f"plain{protocol}.pth")
        written[-1].write_bytes(pickle.dumps(stored, protocol=protocol))
    for path in written:
        with pytest.raises(WeightsError, match="nothing of it was run") as raised:
            read_checkpoint(path)
        assert str(path) in str(raised.value)
        if not path.name.startswith("old"):
            assert "names code to be run" in str(raised.value), path
        assert not marker.exists()
    # The test can fail: read naively, the file does what it should not.
    torch.load(written[0], weights_only=False)
    assert marker.exists() or kind == "getattr"


def test_the_pickled_call_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"args": Malice(os.system, "true")}, path)
    with pytest.raises(WeightsError, match=r"run by whoever reads it: posix\.system;"):
        read_checkpoint(path)


def test_refusal_does_not_depend_on_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "evil.pth"
    torch.save(Malice(os.mkdir, str(tmp_path / "ran")), path)
    with pytest.raises(WeightsError, match="refused"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_numpy_dtypes_of_the_process_cannot_be_changed(tmp_path: Path) -> None:
    class Dtype:
        def __reduce__(self) -> tuple[object, ...]:
            return np.dtype, ("f8",), (3, ">", None, None, None, -1, -1, 0)

    path = tmp_path / "evil.pth"
    torch.save({"best_so_far": Dtype()}, path)
    assert isinstance(read_pickled(path), dict)
    assert np.dtype("f8").isnative
    assert np.frombuffer(np.float64(1.5).tobytes(), "f8")[0] == 1.5


def test_reading_leaves_no_trace_in_torch(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        read_checkpoint(write_pth(tmp_path / "a.pth", TEXT, random_tensors(DUST3R)))
        assert set(torch.serialization.get_safe_globals()) == {*before, argparse.Namespace}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    torch.save(argparse.Namespace(), tmp_path / "namespace.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "namespace.pt", weights_only=True)


def test_threads_may_read_at_the_same_time(tmp_path: Path) -> None:
    tensors = random_tensors(DUST3R)
    path = write_pth(tmp_path / "a.pth", TEXT, tensors)
    read: list[int] = []
    threads = [
        threading.Thread(target=lambda: read.extend(len(read_checkpoint(path).tensors) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [len(tensors)] * 20
