"""Unpickling arrays and plain containers, and nothing that could run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gn_det.budget import check_pickle
from gn_det.errors import InputError

__all__ = ["RECORDS", "unpickle"]

_KINDS = "?biufcSU"


def unpickle(file: Path) -> Any:
    """What a pickle holds, written by Python 3 or 2.

    It may hold numbers, strings, bytes, lists, tuples, dicts, OrderedDicts, sets, and numpy's
    arrays and scalars of numbers and strings. NumPy's own functions are not called on what the
    file says: a forged dtype would make NumPy follow pointers from the file.

    Args:
        file: a local file.

    Raises:
        InputError: it asks for anything else, which is named (``posix.system``), exceeds a budget
            of :mod:`gn_det.budget`, or is no pickle.
    """
    try:
        with open(file, "rb") as stream:
            check_pickle(stream, file)
            stream.seek(0)
            return _Unpickler(stream, encoding="latin1").load()
    except InputError:
        raise
    except _RefusedError as refused:
        raise InputError(
            f"{file} is refused: it asks for {refused}, and pickles are read that hold "
            "arrays and plain containers only"
        ) from refused
    except Exception as error:  # whatever operands out of place make of pickle and NumPy
        reason = str(error) or type(error).__name__
        raise InputError(f"{file} cannot be read as a pickle: {reason}") from error


class _RefusedError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


class _Dtype:
    """np.dtype, whose state can say no more than the order of its bytes."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or np.dtype(code).kind not in _KINDS:
            raise _RefusedError(f"numpy.dtype({str(code)[:20]!r})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _, order, *more = state
        own = self.dtype.itemsize, self.dtype.alignment  # written for strings alone
        if more not in ([None] * 3 + [*sizes, self.dtype.flags] for sizes in (own, (-1, -1))):
            raise _RefusedError(f"numpy.dtype with the state {str(state)[:80]}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """np.ndarray, made by _reconstruct or _frombuffer alone, its dtype one of the above.

    NumPy's constructor would take an object's address from the file, and a second state would free
    memory that other arrays look at.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> _Array:
        raise _RefusedError("numpy.ndarray, made otherwise than by _reconstruct")

    def __setstate__(self, state: tuple) -> None:
        if not self.__dict__.pop("awaits_state", False):
            raise _RefusedError("a second state of an array")
        *version, shape, dtype, fortran, data = state
        super().__setstate__((*version, shape, dtype.dtype, fortran, data))


def _reconstruct(kind: type, shape: tuple, code: object) -> _Array:
    if kind is not _Array or shape != (0,):
        raise _RefusedError(f"an array of the shape {shape} before its content")
    array = np.empty(shape, np.int8).view(_Array)
    array.awaits_state = True
    return array


def _frombuffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    if type(data) not in (bytes, bytearray):
        raise _RefusedError("an array over another's memory")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order).view(_Array)


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
    data = data.encode("latin1") if isinstance(data, str) else data
    (scalar,) = np.frombuffer(data, dtype.dtype)
    return scalar


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _RefusedError(f"the encoding {encoding}")
    return text.encode("latin1")


class _Function:
    """A function that a file can call, and not change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("a change of a function")


_ADMITTED = {
    ("_codecs", "encode"): _Function(_encode),
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
}
for _builtins in ("builtins", "__builtin__"):
    _ADMITTED |= {(_builtins, kind.__name__): kind for kind in (bytes, frozenset, set)}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): _Function(_reconstruct),
        (f"{_core}.multiarray", "scalar"): _Function(_scalar),
        (f"{_core}.numeric", "_frombuffer"): _Function(_frombuffer),
    }


class _Record:
    """In place of what programs keep beside the weights: nothing runs, and its content is lost."""

    def __new__(cls, *args: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping:
    """In place of a subclass of dict: the one of Python's that torch.load lets have a state."""

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


_MAPPINGS = (
    "addict.addict.Dict",
    "collections.defaultdict",
    "detectron2.config.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "yacs.config.CfgNode",
)


# Arguments, configs and logs as programs write them into checkpoints, for torch.load's safe_globals
# by the names that the files ask for; getattr stands in those of mmengine's HistoryBuffer.
RECORDS = (
    [(kind, ".".join(name)) for name, kind in _ADMITTED.items() if name[0].startswith("numpy")]
    + [(type(name.rsplit(".", 1)[1], (_Mapping,), {}), name) for name in _MAPPINGS]
    + [
        (type(name.rsplit(".", 1)[1], (_Record,), {}), name)
        for name in (
            "argparse.Namespace",
            "builtins.dict",
            "builtins.float",
            "builtins.getattr",
            "builtins.int",
            "builtins.list",
            "builtins.str",
            "builtins.tuple",
            "mmcv.utils.config.Config",
            "mmengine.config.config.Config",
            "mmengine.logging.history_buffer.HistoryBuffer",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.nodes.AnyNode",
            "omegaconf.nodes.BooleanNode",
            "omegaconf.nodes.FloatNode",
            "omegaconf.nodes.IntegerNode",
            "omegaconf.nodes.StringNode",
            "pathlib.Path",
            "pathlib.PosixPath",
            "pathlib.PurePosixPath",
            "pathlib.WindowsPath",
            "types.SimpleNamespace",
            "typing.Any",
        )
    ]
)
