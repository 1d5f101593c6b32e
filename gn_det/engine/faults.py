"""What goes wrong around a program and not in it, said in one line."""

from __future__ import annotations

import errno
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gn_det.errors import InputError
from gn_det.files import unwritable
from gn_det.text import reason_of

__all__ = ["check_encoding", "check_open_files", "fault_of", "telling_faults"]

_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed|exited unexp).*")
_OPEN_FILES = re.compile(r"Too many open files|received \d+ items of ancdata")
_FEWEST_OPEN_FILES = 128
_OF_DISKS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS,
    errno.ESTALE,
}  # fmt: skip
_OF_NAMES = {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}


def check_encoding() -> None:
    """Check that names of files in all scripts can be given to libraries.

    Raises:
        InputError: Python takes them to be in another encoding than UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    if encoding.lower() != "utf-8":
        raise InputError(f"Python takes file names to be in {encoding}; set PYTHONUTF8=1")


def check_open_files() -> None:
    """Let this process have as many open files as it may.

    Raises:
        InputError: fewer than a run with loading processes needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < _FEWEST_OPEN_FILES:
        raise InputError(
            f"this process may have {hard} files open, and needs {_FEWEST_OPEN_FILES}; set a "
            "higher limit, as with ulimit -n 4096"
        )


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:100]}...{name[-100:]}"


def fault_of(error: BaseException) -> InputError | None:
    """The fault that an exception comes from, for the user; None where it is a defect."""
    if isinstance(error, InputError):
        return error
    message = str(error)
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or _OPEN_FILES.search(message):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return InputError(
            f"too many open files: this process may have {limit}; set a higher limit, as with "
            "ulimit -n 4096, or use fewer loading processes (DATALOADER.NUM_WORKERS)"
        )
    if getattr(error, "errno", None) in _OF_NAMES and error.filename:
        return InputError(f"{_short(str(error.filename))} is no usable name: {reason_of(error)}")
    if getattr(error, "errno", None) in _OF_DISKS:
        if error.filename:
            return InputError(unwritable(error.filename, error))
        return InputError(
            "a file, standard output or shared memory in /dev/shm cannot be written: "
            f"{reason_of(error)}"
        )
    worker = _WORKER.search(message)
    if worker and "Bus error" in message:
        return InputError(
            f"a loading process ended ({worker[0].strip(' .')}): shared memory, /dev/shm, was "
            "full; make it larger, or set DATALOADER.NUM_WORKERS 0 (--num-workers 0)"
        )
    if worker or isinstance(error, ConnectionResetError):  # of the pipe to it
        what = worker[0].strip(" .") if worker else message
        return InputError(
            f"a loading process ended ({what}), often for want of memory: set "
            "fewer of them, DATALOADER.NUM_WORKERS (--num-workers of the classifiers), or smaller "
            "images or batches; --resume goes on from the last checkpoint"
        )
    return None


@contextmanager
def telling_faults() -> Iterator[None]:
    """Raise what :func:`fault_of` says of an exception in its place.

    From here on, Python is also silent about faults that come up where they cannot be raised: where
    several loading processes are killed, all but the first do so as the loaders are deleted.
    """
    hook = sys.unraisablehook

    def unless_fault(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_value is None or fault_of(unraisable.exc_value) is None:
            hook(unraisable)

    sys.unraisablehook = unless_fault
    try:
        yield
    except (OSError, RuntimeError) as error:
        fault = fault_of(error)
        if fault is None:
            raise
        raise fault from error
