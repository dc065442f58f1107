"""Pickles of plain values and float32 arrays, read opcode by opcode.

Python's own reader looks up what a pickle names and calls it. Here, nothing is looked up and nothing is called: the few
functions by which NumPy's arrays are pickled are known by name, and what they would do is done by this module with
arguments that it has checked. Whatever else a pickle asks for is refused before anything after it is looked at.
"""

from __future__ import annotations

import enum
import itertools
import math
import os
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.tensor_files import first_bytes
from mast3r_sfm.types import Float32

# A dictionary with an array takes fifty; each costs time and memory whatever its size in the file.
_MAX_OPCODES = 1_000
_MAX_DIMENSIONS = 8


class _Function(enum.Enum):
    """What a pickled array names."""

    RECONSTRUCT = enum.auto()
    FROM_BUFFER = enum.auto()
    ARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()


_FUNCTIONS = {
    ("numpy.core.multiarray", "_reconstruct"): _Function.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Function.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Function.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Function.FROM_BUFFER,
    ("numpy", "ndarray"): _Function.ARRAY,
    ("numpy", "dtype"): _Function.DTYPE,
    ("_codecs", "encode"): _Function.ENCODE,
}
# Their argument is the value itself.
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(path: Path) -> object:
    """Read a pickle of None, booleans, numbers, texts, bytes, tuples, dictionaries with texts as keys, and arrays.

    Args:
        path: the file; any protocol.

    Returns:
        The value. Arrays in it are `PickledArray`, of float32; they hold no more than the file does.

    Raises:
        WeightsError: the file cannot be read, is not whole, or would have something else made or run; nothing is.
    """
    first_bytes(path)
    try:
        with path.open("rb") as stream:
            bounded = _Bounded(stream)
            return _Reader(bounded.size).read(bounded)
    except _RefusedError as error:
        raise WeightsError(
            f"{path} is refused, and nothing of it was run: {error}; get the file from its publisher"
        ) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a file that is none makes a reader stumble in any way
        raise WeightsError(f"{path} is not a pickle, or not whole; nothing of it was run; get it again") from error


class PickledArray:
    """An array in a pickle, which states first that there is one, and later what it holds."""

    def __init__(self) -> None:
        self.values: Float32 | None = None
        """None where the pickle does not say."""


class _RefusedError(Exception):
    """The pickle asks for what is not given."""


@dataclass
class _Float32:
    """A dtype; it is float32, and the byte order is all that is open."""

    order: str = "<"


class _Mark:
    """Where the items of a tuple or dictionary begin on the stack."""


class _Bounded:
    """A file as `pickletools` reads it: asked for more than is left, it gives what is left.

    A length in a hostile file would otherwise be allocated before it turns out that the file is shorter.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.readline, self.tell = stream.readline, stream.tell

    def read(self, count: int) -> bytes:
        return self._stream.read(max(min(count, self.size - self._stream.tell()), 0))


class _Reader:
    """The stack and the memo of one pickle."""

    def __init__(self, size: int) -> None:
        # Bytes that may come of what the file holds: once as text that becomes bytes, once as bytes that become arrays.
        self._allowance = 2 * size
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self, stream: _Bounded) -> object:
        """The value that a pickle makes.

        Raises:
            _RefusedError: it makes something else than a plain value.
            Exception: it is not whole, or none; of any kind.
        """
        for opcode, argument, _ in itertools.islice(pickletools.genops(stream), _MAX_OPCODES):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                (value,) = self._stack
                return value
            self._step(opcode.name, argument)
        raise _RefusedError(f"it takes more than {_MAX_OPCODES:,} steps to read")

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            self._stack.append(tuple(self._take(_TUPLES[opcode])))
        elif opcode in _PUT:
            self._remember(argument)
        elif opcode in _GET:
            self._stack.append(self._memo[argument])
        elif opcode == "GLOBAL":
            self._name(*argument.split(" ", 1))
        elif opcode in self._ACTIONS:
            self._ACTIONS[opcode](self)
        elif opcode not in ("PROTO", "FRAME"):
            raise _RefusedError(f"it is made of more than plain values and arrays (pickle opcode {opcode})")

    def _take(self, count: int) -> list[Any]:
        """The last items off the stack; they must all lie above the last mark."""
        items = self._stack[-count:]
        if len(items) < count or any(isinstance(item, _Mark) for item in items):
            raise ValueError("the stack holds too little")
        del self._stack[-count:]
        return items

    def _items(self) -> list[Any]:
        """What lies above the last mark, and the mark off the stack."""
        start = max(index for index, item in enumerate(self._stack) if isinstance(item, _Mark))
        items = self._stack[start + 1 :]
        del self._stack[start:]
        return items

    def _drop(self) -> None:
        del self._stack[-1]

    def _remember(self, number: int) -> None:
        if isinstance(self._stack[-1], _Mark):
            raise ValueError("a mark is no value")
        self._memo[number] = self._stack[-1]

    def _fill(self, items: list[Any]) -> None:
        if not self._stack or type(self._stack[-1]) is not dict:
            raise _RefusedError("it sets items of something that is no dictionary")
        _dictionary(self._stack[-1], items)

    def _name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _RefusedError("it names code by something that is no text")
        function = _FUNCTIONS.get((module, name))
        if function is None:
            raise _RefusedError(f"it names code to be run by whoever reads it: {f'{module}.{name}'[:80]!r}")
        self._stack.append(function)

    def _reduce(self) -> None:
        made = _made(*self._take(2))
        self._spend(made if isinstance(made, bytes) else getattr(made, "values", None))
        self._stack.append(made)

    def _spend(self, made: bytes | Float32 | None) -> None:
        """Take what was made off the allowance: a pickle can have one large text made into bytes again and again."""
        self._allowance -= 0 if made is None else len(made) if isinstance(made, bytes) else made.nbytes
        if self._allowance < 0:
            raise _RefusedError("it makes more of its bytes than there are")

    def _build(self) -> None:
        target, state = self._take(2)
        if isinstance(target, _Float32):
            target.order = _byte_order(state)
        elif isinstance(target, PickledArray) and target.values is None:
            match state:
                case (int(), tuple() as shape, _Float32() as dtype, bool() | 0 | 1 as fortran, bytes() as data):
                    target.values = _array(data, dtype, shape, "F" if fortran else "C")
                    self._spend(target.values)
                case _:
                    raise _RefusedError("an array in it is none of plain float32 numbers")
        else:
            raise _RefusedError("it changes an object that is no new array")
        self._stack.append(target)

    _ACTIONS: ClassVar[dict[str, Callable[[_Reader], None]]] = {
        "MARK": lambda self: self._stack.append(_Mark()),
        "POP": _drop,
        "TUPLE": lambda self: self._stack.append(tuple(self._items())),
        "EMPTY_DICT": lambda self: self._stack.append({}),
        "DICT": lambda self: self._stack.append(_dictionary({}, self._items())),
        "SETITEM": lambda self: self._fill(self._take(2)),
        "SETITEMS": lambda self: self._fill(self._items()),
        "MEMOIZE": lambda self: self._remember(len(self._memo)),
        "STACK_GLOBAL": lambda self: self._name(*self._take(2)),
        "REDUCE": _reduce,
        "BUILD": _build,
    }


def _made(function: object, arguments: object) -> object:
    """What a call in a pickle comes to, where it is one of those by which arrays are pickled."""
    match function, arguments:
        case _Function.RECONSTRUCT, (_Function.ARRAY, (0,), b"b"):
            return PickledArray()
        case _Function.DTYPE, (str(code), bool() | 0 | 1, bool() | 0 | 1):
            if code != "f4":
                raise _RefusedError(f"it holds an array of type {code[:20]!r}, where float32 is expected")
            return _Float32()
        case _Function.ENCODE, (str(text), "latin1"):
            return text.encode("latin1")
        case _Function.FROM_BUFFER, (bytes() | bytearray() as data, _Float32() as dtype, tuple() as shape, str(order)):
            array = PickledArray()
            array.values = _array(data, dtype, shape, order)
            return array
    raise _RefusedError("it makes something else than an array of plain numbers")


def _byte_order(state: object) -> str:
    match state:
        case (int(), "<" | ">" as order, None, None, None, -1, -1, 0):
            return str(order)
    raise _RefusedError("an array in it has elements that are no plain float32 numbers")


def _array(data: bytes | bytearray, dtype: _Float32, shape: tuple[object, ...], order: str) -> Float32:
    sizes = [size for size in shape if type(size) is int and size >= 0]
    if len(sizes) < len(shape) or len(sizes) > _MAX_DIMENSIONS:
        raise _RefusedError("an array in it has an impossible shape")
    if 4 * math.prod(sizes) != len(data):
        raise _RefusedError(f"an array in it has {len(data):,} bytes, which is not what its shape asks for")
    values = np.frombuffer(data, f"{dtype.order}f4") if data else np.zeros(0, np.float32)
    if order not in ("C", "F"):
        raise _RefusedError("the numbers of an array in it stand in an unknown order")
    return values.reshape(sizes, order="F" if order == "F" else "C").astype(np.float32, copy=False)


def _dictionary(target: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    keys, values = items[::2], items[1::2]
    if not all(isinstance(key, str) for key in keys):
        raise _RefusedError("a dictionary in it has keys that are no texts")
    target.update(zip(keys, values, strict=True))
    return target
