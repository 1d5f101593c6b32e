"""Budgets for files from strangers: what reading one may cost, counted before it is read.

A few hundred bytes of a pickle can nest tuples that take forever to hash, and a small archive can
unpack to more than memory holds.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

from gn_det.errors import InputError

__all__ = ["check_archive", "check_pickle"]

MAX_DEPTH = 100  # containers inside each other
MAX_NODES = 100_000_000  # values, each counted as often as it is referred to
MAX_RATIO = 10  # bytes unpacked for each byte of an archive

_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")
_CHANGE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_MARK = object()


def check_pickle(stream: IO[bytes], name: str | Path) -> None:
    """Follow a pickle's instructions without making what they make, and count that.

    Args:
        stream: at the beginning of a pickle; afterwards behind its end.
        name: of the file, for the error.

    Raises:
        InputError: values nested deeper than MAX_DEPTH, or more than MAX_NODES of them.
        ValueError: it is no pickle.
    """
    stack: list[Any] = []  # [nodes, depth] of each value
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(stream):
            code = operation.name
            if code in _PUT:
                memo[argument] = stack[-1]
                if argument > 2 * len(memo) + 1000:  # pickle makes room for all below
                    raise InputError(f"{name} is refused: it numbers a value {argument}")
            elif code == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code in _GET:
                stack.append(memo[argument])
            elif code == "MARK":
                stack.append(_MARK)
            elif code == "DUP":
                stack.append(stack[-1])
            else:
                _apply(operation, stack, name)
    except InputError:
        raise
    except Exception as error:  # whatever operands out of place make of pickletools and the stack
        reason = ascii(str(error))[1:-1] or type(error).__name__
        raise ValueError(f"it is no pickle: {reason}") from error


def _apply(operation: Any, stack: list[Any], name: str | Path) -> None:
    """Take an instruction's operands off the stack, and put its result there."""
    operands = []
    fixed = len(operation.stack_before)
    if pickletools.markobject in operation.stack_before:
        while (operand := stack.pop()) is not _MARK:
            operands.append(operand)
        fixed = operation.stack_before.index(pickletools.markobject)
    for _ in range(fixed):
        operands.append(stack.pop())
    if not operation.stack_after:
        return
    nodes = 1 + sum(operand[0] for operand in operands)
    depth = 1 + max((operand[1] for operand in operands), default=0)
    if depth > MAX_DEPTH or nodes > MAX_NODES:
        raise InputError(
            f"{name} is refused: it holds values nested {depth} deep or {nodes} of them, more than "
            f"{MAX_DEPTH} and {MAX_NODES}"
        )
    if operation.name in _CHANGE:
        changed = operands[-1]
        changed[:] = nodes, max(depth - 1, changed[1])
        stack.append(changed)
    else:
        stack.append([nodes, depth])


def check_archive(file: Path) -> None:
    """Check the budgets of what torch.save wrote: an archive, or pickles one after the other.

    Checksums of an archive are compared as well, which torch.load does not do.

    Raises:
        InputError: a checksum is another, it would unpack to more than MAX_RATIO times its size, or
            see :func:`check_pickle`.
    """
    try:
        if not zipfile.is_zipfile(file):
            with open(file, "rb") as stream:
                for _ in range(4):  # magic number, protocol, system, content
                    check_pickle(stream, file)
            return
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            size = file.stat().st_size
            if unpacked > MAX_RATIO * size:
                raise InputError(
                    f"{file} is refused: {size} bytes would unpack to {unpacked}, more than "
                    f"{MAX_RATIO} times as many"
                )
            for entry in archive.infolist():
                if not entry.CRC:  # as torch.serialization.set_crc32_options(False) leaves it
                    del entry.CRC
                with archive.open(entry) as stream:
                    if entry.filename.endswith("data.pkl"):
                        check_pickle(io.BytesIO(stream.read()), file)
                    while stream.read(2**20):  # to the end, where the checksum is compared
                        pass
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{file} cannot be read as weights: it is damaged ({error}); copy or download it again"
        ) from error
    except Exception as error:  # whatever zipfile makes of archives that are damaged
        raise InputError(
            f"{file} cannot be read as weights: it is no file that torch.save wrote"
        ) from error
