from __future__ import annotations

import pytest

from mast3r_sfm.progress import Progress, SilentProgress, steps


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.calls.append(("start", stage, total, unit))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_steps_finish_the_stage() -> None:
    recorder = Recorder()
    with steps(recorder, "encode", 3, "image"):
        assert recorder.calls == [("start", "encode", 3, "image")]
    assert recorder.calls[1:] == [("finish",)]


def test_steps_finish_the_stage_when_it_fails() -> None:
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="disk"), steps(recorder, "encode", 3, "image"):
        raise RuntimeError("disk")
    assert recorder.calls[-1] == ("finish",)


def test_silence_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    silent: Progress = SilentProgress()
    with steps(silent, "match", 2, "pair"):
        silent.advance()
        silent.note("note")
        silent.warn("warning")
    assert capfd.readouterr() == ("", "")
