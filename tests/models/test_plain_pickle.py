"""Pickles of plain values and arrays, and of what must neither run nor be made."""

from __future__ import annotations

import gc
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.plain_pickle import PickledArray, read_plain_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def write(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return path


def refusal(path: Path, value: object, protocol: int = 4) -> str:
    """The message with which a file is refused."""
    with pytest.raises(WeightsError, match="nothing of it was run") as raised:
        read_plain_pickle(write(path, value, protocol))
    assert str(path) in str(raised.value)
    return str(raised.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@given(value=plain, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_come_back(value: object, protocol: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = read_plain_pickle(write(tmp_path_factory.mktemp("a") / "a.pkl", value, protocol))
    assert found == value
    assert type(found) is type(value)


@given(
    values=arrays.arrays(np.float32, arrays.array_shapes(max_side=4)),
    order=st.sampled_from("CF"),
    byte_order=st.sampled_from("<>"),
    protocol=st.sampled_from(PROTOCOLS),
)
def test_arrays_come_back(
    values: np.ndarray, order: Any, byte_order: str, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stored = {"a": np.asarray(values, f"{byte_order}f4", order=order), "b": (1, np.zeros(2, np.float32))}
    found: Any = read_plain_pickle(write(tmp_path_factory.mktemp("a") / "a.pkl", stored, protocol))
    assert isinstance(found["a"], PickledArray)
    assert found["a"].values.dtype == np.float32
    assert found["a"].values.dtype.isnative
    np.testing.assert_array_equal(found["a"].values, values)
    np.testing.assert_array_equal(found["b"][1].values, np.zeros(2))


def test_a_large_array_is_held_once_and_let_go(tmp_path: Path) -> None:
    values = np.zeros((1000, 2000), np.float32)
    path = write(tmp_path / "a.pkl", {"a": values})
    read_plain_pickle(path)  # what is made at first use
    gc.disable()
    tracemalloc.start()
    try:
        found = read_plain_pickle(path)
        current, peak = tracemalloc.get_traced_memory()
        assert values.nbytes <= current <= peak < 1.1 * values.nbytes
        del found
        assert tracemalloc.get_traced_memory()[0] < 0.1 * values.nbytes
    finally:
        tracemalloc.stop()
        gc.enable()


def test_names_of_older_numpy(tmp_path: Path) -> None:
    data = pickle.dumps({"a": np.arange(3, dtype=np.float32)}, protocol=2)
    old = data.replace(b"numpy._core.", b"numpy.core.")
    new = old.replace(b"numpy.core.", b"numpy._core.")
    assert old != new
    for variant in (old, new):
        found: Any = read_plain_pickle(write(tmp_path / "a.pkl", variant))
        np.testing.assert_array_equal(found["a"].values, np.arange(3))


class Malice:
    """Unpickled naively, it would call a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", ["whole", "value", "words"])
def test_calls_are_refused_and_not_made(protocol: int, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for malice in (
        Malice(os.system, f"touch {marker}"),
        Malice(eval, f"__import__('os').mkdir({str(marker)!r})"),
        Malice(exec, f"import os; os.mkdir({str(marker)!r})"),
        Malice(getattr, Malice(__import__, "os"), "system"),
        Malice(np.save, str(marker), 1),
        Malice(np.load, str(marker), None, True),
        Malice(np.memmap, str(marker), "u1", "w+", 0, (9,)),
        Malice(Path.touch, marker),
    ):
        stored: object = {
            "whole": malice,
            "value": {"type": "Codebook", "params": {"size": malice}},
            "words": {"type": "Codebook", "params": {"size": 1}, "state": {"centroids": malice}},
        }[place]
        assert "it names code to be run by whoever reads it" in refusal(tmp_path / "evil.pkl", stored, protocol)
        assert list(tmp_path.iterdir()) == [tmp_path / "evil.pkl"]
    # The test can fail: read naively, a file does what it should not.
    pickle.loads(pickle.dumps(Malice(os.mkdir, str(marker))))
    assert marker.exists()


def test_the_name_is_told(tmp_path: Path) -> None:
    assert "'posix.system'" in refusal(tmp_path / "evil.pkl", Malice(os.system, "true"))


def stack_global(module: bytes, name: bytes) -> bytes:
    return b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"


def test_names_with_dots_do_not_reach_into_modules(tmp_path: Path) -> None:
    """Protocol 4 lets a name be a path of attributes: numpy, in whose modules os and sys can be found."""
    for module, name in (
        (b"numpy", b"os.system"),
        (b"numpy", b"ndarray.__class__"),
        (b"numpy", b"dtype.__reduce__"),
        (b"numpy._core.multiarray", b"_reconstruct.__self__"),
        (b"numpy.core.multiarray", b"os.system"),
        (b"_codecs", b"encode.__self__"),
        (b"_codecs", b"decode"),
        (b"numpy._core.numeric", b"fromfile"),
        (b"numpy", b"fromfile"),
        (b"", b"eval"),
    ):
        data = stack_global(module, name) + b"\x8c\x04true\x85R."
        assert "names code" in refusal(tmp_path / "evil.pkl", data)
    for data in (b"\x80\x04K\x01K\x02\x93.", b"\x80\x04K\x01\x93.", b"\x80\x04(K\x01\x93."):
        refusal(tmp_path / "evil.pkl", data)


def test_only_float32_without_anything_hidden_in_it(tmp_path: Path) -> None:
    for value, part in (
        (np.array([Malice(os.system, "true"), None], dtype=object), "type 'O8'"),
        (np.zeros(3, [("a", "f4"), ("b", "O")]), "type 'V12'"),
        (np.zeros(3, np.float64), "type 'f8'"),
        (np.array(["text"]), "type 'U4'"),
        (np.array(["2020-01-01"], "M8[D]"), "type 'M8'"),
        (np.float32(1), "scalar"),
        (np.ma.array([1.0], mask=[True]), "names code"),
        (np.random.default_rng(0), "names code"),
        ([1, 2], "LIST"),
        ({1, 2}, ""),
        ({1: 2}, "keys that are no texts"),
        ({(): 2}, "keys that are no texts"),
        (Malice(np.dtype, "O", False, True), "where float32 is expected"),
        (Malice(np.dtype, "f4", False, True, {"metadata": 1}), "something else"),
        (Malice(np.ndarray, (3,), "f4"), "something else"),
    ):
        for protocol in PROTOCOLS:
            assert part in refusal(tmp_path / "evil.pkl", value, protocol), (value, protocol)


def test_numpy_dtypes_of_the_process_cannot_be_changed(tmp_path: Path) -> None:
    class Dtype:
        def __init__(self, state: tuple[object, ...]) -> None:
            self.state = state

        def __reduce__(self) -> tuple[object, ...]:
            return np.dtype, ("f4", False, True), self.state

    # The dtype that a process has once for all its arrays, as the other byte order.
    read_plain_pickle(write(tmp_path / "a.pkl", Dtype((3, ">", None, None, None, -1, -1, 0))))
    assert np.dtype("f4").isnative
    for state in (
        (3, "<", None, None, None, 8, 4, 0),
        (3, "<", ("f4", (2,)), None, None, -1, -1, 0),
        (3, "|", None, ("a",), {"a": ("O", 0)}, 8, 8, 63),
        (3, "<", None, None, None, -1, -1, 63),
        (3, "<", None, None, None, -1, -1, 0, {"metadata": 1}),
        (4, "<", None, None, None, -1, -1),
    ):
        refusal(tmp_path / "evil.pkl", Dtype(state))
    assert np.dtype("f4").itemsize == 4
    assert np.frombuffer(np.float32(1.5).tobytes(), "f4")[0] == 1.5


def array_pickle(shape: tuple[object, ...], data: bytes, fortran: object = False, version: object = 1) -> bytes:
    class Array:
        def __reduce__(self) -> tuple[object, ...]:
            first = np.zeros(0, np.float32).__reduce__()
            return first[0], first[1], (version, shape, np.dtype("f4"), fortran, data)

    return pickle.dumps(Array(), protocol=4)


def test_a_shape_must_be_that_of_the_bytes(tmp_path: Path) -> None:
    found: Any = read_plain_pickle(write(tmp_path / "a.pkl", array_pickle((2, 1), bytes(8))))
    assert found.values.shape == (2, 1)
    tracemalloc.start()
    for shape, data, part in (
        ((1 << 40, 1024), bytes(8), "8 bytes, which is not what its shape asks for"),
        ((1 << 62, 1 << 62), b"", "0 bytes, which is not what its shape asks for"),
        ((0, 1 << 70), b"", "not a pickle, or not whole"),
        ((2,), bytes(9), "9 bytes, which is not what its shape asks for"),
        ((-1, -2), bytes(8), "impossible shape"),
        ((True, 2), bytes(8), "impossible shape"),
        ((2.0,), bytes(8), "impossible shape"),
        ((None,), bytes(4), "impossible shape"),
        (((2,),), bytes(8), "impossible shape"),
        ((1,) * 40, bytes(4), "impossible shape"),
    ):
        assert part in refusal(tmp_path / "evil.pkl", array_pickle(shape, data))
    refusal(tmp_path / "evil.pkl", array_pickle((2,), bytes(8), fortran=5))
    refusal(tmp_path / "evil.pkl", array_pickle((2,), bytes(8), fortran=b"x"))
    refusal(tmp_path / "evil.pkl", array_pickle((2,), bytes(8), version="1"))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_lengths_beyond_the_file_are_not_allocated(tmp_path: Path) -> None:
    huge = struct.pack("<Q", 1 << 40)
    tracemalloc.start()
    for data in (
        b"\x80\x04\x8e" + huge + b"abc.",  # BINBYTES8
        b"\x80\x05\x96" + huge + b"abc.",  # BYTEARRAY8
        b"\x80\x04\x8d" + huge + b"abc.",  # BINUNICODE8
        b"\x80\x04B\xff\xff\xff\xffabc.",  # BINBYTES
        b"\x80\x02\x8b\xff\xff\xff\x7fabc.",  # LONG4
        b"\x80\x04\x95" + huge + b"K\x01r\xff\xff\xff\xff",  # FRAME, LONG_BINPUT, and nothing after
    ):
        refusal(tmp_path / "evil.pkl", data)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    # A large number in the memo is none: only what is put there is kept.
    assert read_plain_pickle(write(tmp_path / "a.pkl", b"\x80\x04K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.")) == 7


def test_one_text_is_not_made_into_bytes_again_and_again(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
    again = b"h\x01h\x00h\x02\x86R"
    once = b"\x80\x02" + text + b"0" + encode + b"00" + again + b"."
    found = read_plain_pickle(write(tmp_path / "a.pkl", once))
    assert isinstance(found, bytes)
    assert len(found) == 100_000
    often = b"\x80\x02" + text + b"0" + encode + b"00" + 100 * again + b"."
    assert "more of its bytes than there are" in refusal(tmp_path / "evil.pkl", often)


def test_tricks_with_the_stack_and_the_memo(tmp_path: Path) -> None:
    # An array, and what it is filled with, kept in the memo; then filled a second time.
    function, arguments, _ = np.zeros(0, np.float32).__reduce__()  # type: ignore[misc]
    parts = function, arguments, (1, (1,), np.dtype("f4"), False, bytes(4))
    array = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in parts[:2]) + b"Rr\xe8\x03\x00\x00"
    once = array + pickle.dumps(parts[2], protocol=2)[2:-1] + b"r\xe9\x03\x00\x00b"
    found: Any = read_plain_pickle(write(tmp_path / "a.pkl", b"\x80\x02" + once + b"."))
    assert found.values.tolist() == [0]
    twice = refusal(tmp_path / "evil.pkl", b"\x80\x02" + once + b"j\xe9\x03\x00\x00b.")
    assert "changes an object that is no new array" in twice
    for data in (
        b"\x80\x04.",  # nothing to return
        b"\x80\x04K\x01K\x02.",  # two things
        b"\x80\x04h\x07.",  # a memo that was never written
        b"\x80\x04\x94.",  # remember nothing
        b"\x80\x04(\x94.",  # remember a mark
        b"\x80\x04t.",  # a tuple without a mark
        b"\x80\x04(K\x01\x86.",  # two items, one of which is a mark
        b"\x80\x04K\x01K\x02b.",  # change a number
        b"\x80\x04}}b.",  # change a dictionary
        b"\x80\x04}\x94(\x8c\x01ah\x00h\x00u.",  # an odd number of items
        b"\x80\x04K\x01\x8c\x01aK\x02s.",  # an item of a number
        b"\x80\x04K\x01)R.",  # call a number
        b"\x80\x04})R.",  # call a dictionary
        b"\x80\x04" + stack_global(b"numpy", b"dtype")[2:] + b"}b.",  # change NumPy's class
        b"\x80\x04" + stack_global(b"numpy", b"ndarray")[2:] + b")\x81.",  # make an instance without a call
        b"(inumpy\nndarray\n.",  # as in protocol 0
        b"\x80\x02\x82\x01.",  # the registry of extensions
        b"\x80\x04\x8c\x05evil:Q.",  # what lies outside of the file
        b"\x80\x05\x97.",  # a buffer from outside
        b"\x80\x04" + 2_000 * b"K\x010" + b"K\x01.",  # steps without end
    ):
        refusal(tmp_path / "evil.pkl", data)
    # A dictionary that holds itself is neither looked through nor printed.
    found = read_plain_pickle(write(tmp_path / "a.pkl", b"\x80\x04}\x94\x8c\x01ah\x00s."))
    assert found["a"] is found


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    for protocol in PROTOCOLS:
        stored = {"type": "Codebook", "state": {"centroids": np.ones((3, 2), np.float32)}}
        data = pickle.dumps(stored, protocol=protocol)
        for length in range(1, len(data), 4):
            refusal(tmp_path / "cut.pkl", data[:length])


def outcome(path: Path, data: bytes) -> str:
    """The path where a value is read, else the message."""
    try:
        read_plain_pickle(write(path, data))
    except WeightsError as error:
        return str(error)
    return str(path)


@given(data=st.binary(min_size=1, max_size=60))
def test_any_bytes_end_in_a_value_or_in_words(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("a") / "a.pkl"
    assert str(path) in outcome(path, data)


@given(protocol=st.sampled_from(PROTOCOLS), place=st.integers(0, 250), wrong=st.binary(min_size=1, max_size=1))
def test_one_wrong_byte_ends_in_a_value_or_in_words(
    protocol: int, place: int, wrong: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = pickle.dumps({"state": {"centroids": np.ones((3, 2), np.float32)}}, protocol)
    place %= len(good)
    path = tmp_path_factory.mktemp("a") / "a.pkl"
    assert str(path) in outcome(path, good[:place] + wrong + good[place + 1 :])


def test_files_that_are_no_pickles(tmp_path: Path) -> None:
    for data, part in ((b"", "is empty"), (b"<!doctype html>", "web page"), (b"version https://git-lfs.x", "git LFS")):
        with pytest.raises(WeightsError, match=part):
            read_plain_pickle(write(tmp_path / "a.pkl", data))
    with pytest.raises(WeightsError, match="cannot read"):
        read_plain_pickle(tmp_path / "none.pkl")
    with pytest.raises(WeightsError, match="cannot read"):
        read_plain_pickle(tmp_path)


def test_all_opcodes_are_either_known_or_refused(tmp_path: Path) -> None:
    """None of those by which a pickle has code run in other ways is read."""
    for opcode in pickletools.opcodes:
        if opcode.name in {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}:
            argument = io.BytesIO(b"\x01" * 8 + b"\na\n").read() if opcode.arg else b""
            data = b"\x80\x04(" + opcode.code.encode("latin1") + argument + b"."
            assert f"opcode {opcode.name})" in refusal(tmp_path / "evil.pkl", data)
