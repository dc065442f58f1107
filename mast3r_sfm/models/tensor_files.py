"""Files of tensors, read without running anything that they may hold."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch

from mast3r_sfm.errors import WeightsError

# Opcodes by which a pickle has code run: it names a function or class, and calls it or fills its instance.
_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4"}
_ZIP = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 64 * 2**20

# torch keeps one list of what may be unpickled for the whole process.
_lock = threading.Lock()


class _Dropped:
    """What stands in for a NumPy scalar and its dtype: takes whatever it is given, and keeps nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# Training leaves its settings in a Namespace, and may leave its best score as a NumPy scalar. NumPy's own functions are
# not called: a pickle could use them to change dtypes that the whole process shares.
_ALLOWED: list[Any] = [
    (argparse.Namespace, "argparse.Namespace"),
    (_Dropped, "numpy.dtype"),
    (_Dropped, "numpy.core.multiarray.scalar"),
    (_Dropped, "numpy._core.multiarray.scalar"),
]


def read_pickled(path: Path) -> object:
    """What `torch.save` wrote, of tensors, plain values, containers and `argparse.Namespace`.

    Tensors of files in torch's zip format are mapped into memory and not copied.

    Raises:
        WeightsError: the file cannot be read, is no such file, or would have code run, which is not done.
    """
    header = first_bytes(path)
    # torch takes the records of a mapped file as they lie there.
    mapped = header.startswith(_ZIP) and _is_stored_plainly(path)
    with _lock, warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
        warnings.simplefilter("ignore")  # about pickle protocols; what they cannot express is refused below
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            problem = str(error)
        except Exception as error:  # a broken file makes the reader stumble in any way; torch's own errors explain it
            reason = f" ({_first_sentence(error)})" if isinstance(error, RuntimeError) else ""
            raise WeightsError(f"{path} is not a file of weights, or not whole{reason}; get it again") from error
    name = re.search(r"GLOBAL ([\w.]+)", problem)
    if name is not None or _names_code(path, header):
        what = f": {name[1]}" if name else ""
        raise WeightsError(
            f"{path} is refused, and nothing of it was run: it names code to be run by whoever reads it{what}; "
            "get the weights from their publisher, or as .safetensors"
        )
    raise WeightsError(f"{path} is not a file of weights; nothing of it was run")


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, mapped into memory and not copied, and the file's metadata.

    Raises:
        WeightsError: the file cannot be read, or is no such file.
    """
    first_bytes(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole .safetensors file ({error}); get it again") from error


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file that may be what it should be.

    Raises:
        WeightsError: it cannot be read, is empty, a pointer of git LFS or a web page.
    """
    try:
        with path.open("rb") as stream:
            header = stream.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if not header:
        raise WeightsError(f"{path} is empty; get it again")
    if header.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} only points to the weights (git LFS): run git lfs pull, or get the file itself")
    if header.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page, not a file of weights; get it again")
    return header


def _first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", str(error))[0]


def _is_stored_plainly(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # torch says what is wrong


def _names_code(path: Path, header: bytes) -> bool:
    """Whether the file is a pickle that would have code run; for pickles that torch's reader does not follow."""
    try:
        if header.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(name) as stream:
                    data = stream.read(_MAX_PICKLE_BYTES)
        else:
            with path.open("rb") as stream:
                data = stream.read(_MAX_PICKLE_BYTES)
        return any(opcode.name in _CODE for opcode, _, _ in list(pickletools.genops(data)))
    except Exception:  # not a pickle, in any of the ways in which a file can be none
        return False
