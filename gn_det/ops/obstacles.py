"""Why the kernels could not be compiled, loaded or launched, in one line with what to do."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path
from subprocess import CalledProcessError

__all__ = ["obstacle_of"]

# Of a device that can do nothing more, or has no memory left: ATen could not go on either.
_NOT_OURS = (
    "out of memory|illegal memory access|illegal instruction|misaligned address|device-side assert"
    "|unspecified launch failure|hardware stack error|invalid program counter|uncorrectable ECC"
    "|fallen off the bus|device is lost|launch timed out|re-initialize CUDA in forked"
)

_NEW_CACHE = "remove Triton's cache, ~/.triton/cache or the folder in TRITON_CACHE_DIR"

# What an error says, its type before it, and what that means; the first that fits.
_MEANINGS = {
    "Failed to find C compiler": "Triton builds its launcher with a C compiler and found none; "
    "install gcc (Debian, Ubuntu: apt-get install gcc; Fedora: dnf install gcc) or name one in CC",
    r"FileNotFoundError.*\bptxas": "Triton's assembler ptxas is not there; install triton anew",
    r"PermissionError.*\bptxas": "Triton's assembler ptxas cannot be executed; install triton anew",
    "libcuda.so": "the driver's library libcuda.so.1 was not found; run ldconfig, start the "
    "container with the GPU's driver, or set TRITON_LIBCUDA_PATH",
    "active drivers": "Triton found no driver of a GPU, or more than one",
    "No space left|Disk quota|ENOSPC": "the disk of Triton's cache is full; set TRITON_CACHE_DIR "
    "to a folder with room",
    "failed to map segment": "Triton's cache lies where nothing may be executed; set "
    "TRITON_CACHE_DIR to a folder that is not mounted noexec",
    "Read-only file system|Permission denied|Not a directory|File exists|cache dir": "Triton's "
    "cache cannot be written; set TRITON_CACHE_DIR to a folder that can",
    "ELF|file too short|undefined symbol|Failed to load newly compiled": "a library in Triton's "
    f"cache is damaged or of another Python; {_NEW_CACHE}",
    "JSONDecodeError|UnicodeDecodeError|EOFError|image is invalid|invalid device image"
    "|named symbol not found|FileNotFoundError": f"a file of Triton's cache is damaged or "
    f"gone; {_NEW_CACHE}",
    "unsupported toolchain|unsupported PTX|driver version is insufficient": "the GPU's driver is "
    "older than this Triton; update the driver, or take an older PyTorch and its Triton",
    r"bf16|bfloat16": "the GPU or this Triton has no bfloat16; train in float16 or float32",
    "gpu-name|no kernel image|not a recognized processor|not supported on this arch"
    r"|requires? .*sm_\d+|\.target|unsupported arch": "the GPU is too old, or too new, for this "
    "Triton",
    "out of resource": "the GPU has too little on a multiprocessor for this shape",
}


def obstacle_of(error: Exception) -> str | None:
    """What kept the kernels from running and what to install or set, in one line.

    Args:
        error: that compiling, loading or launching them raised.

    Returns:
        None where the device itself is broken or its memory is full; that is to be raised.
    """
    said = f"{type(error).__name__}: {error}"
    if re.search(_NOT_OURS, said, re.IGNORECASE):
        return None
    line = " ".join(said.split())
    short = line if len(line) <= 300 else f"{line[:300]}..."
    if isinstance(error, OSError) and error.filename and error.filename == os.environ.get("CC"):
        return f"CC names a C compiler that cannot be run; install it, or unset CC ({short})"
    if isinstance(error, CalledProcessError):
        return f"{_of_c_compiler()} ({short})"
    for pattern, meaning in _MEANINGS.items():
        if re.search(pattern, said):
            return f"{meaning} ({short})"
    return short


def _of_c_compiler() -> str:
    """Why building Triton's launcher failed: the compiler's own words went to stderr."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.exists():
        version = ".".join(map(str, sys.version_info[:2]))
        return (
            f"Triton builds its launcher with Python's headers, and there is no {header}; install "
            f"them (Debian, Ubuntu: apt-get install python{version}-dev; Fedora: dnf install "
            "python3-devel)"
        )
    return "the C compiler that builds Triton's launcher failed; it says why above"
