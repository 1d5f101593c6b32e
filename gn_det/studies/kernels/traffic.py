"""Count what kernels load and store, in Triton's interpreter.

The interpreter (TRITON_INTERPRET=1, set before triton is imported) runs programs one after the
other in NumPy. Here its loads and stores are watched: how many bytes of which tensor were asked
for, and how many 32-byte sectors, the least that memory moves, they lie in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from gn_det.ops.kernels.launch import Launch, run

__all__ = ["SECTOR_BYTES", "Access", "Traffic", "count_traffic"]

SECTOR_BYTES = 32


@dataclass
class Access:
    """What one kernel argument was read or written for.

    Attributes:
        bytes: those of elements that were not masked.
        sectors: distinct sectors that each program touched, summed over programs.
    """

    bytes: int = 0
    sectors: int = 0


@dataclass
class Traffic:
    """Loads and stores by argument name, of the programs that ran."""

    loads: dict[str, Access] = field(default_factory=dict)
    stores: dict[str, Access] = field(default_factory=dict)


def count_traffic(launch: Launch, programs: Sequence[int] | None = None) -> Traffic:
    """Run a launch on CPU tensors and count its traffic.

    Args:
        programs: those to run; default all.

    Raises:
        IndexError: the kernel touched an address outside of its tensors.
    """
    if programs is None:
        programs = range(launch.num_programs)
    tensors = {
        name: argument
        for name, argument in zip(launch.kernel.arg_names, launch.arguments, strict=False)
        if isinstance(argument, Tensor)
    }
    traffic = Traffic()
    touched: dict[tuple[str, str], set[int]] = {}

    def record(direction: str, addresses: np.ndarray, mask: np.ndarray) -> None:
        used = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.int64)
        if used.size == 0:
            return
        name, itemsize = _owner(tensors, used)
        getattr(traffic, direction).setdefault(name, Access()).bytes += used.size * itemsize
        sectors = np.unique(used // SECTOR_BYTES).tolist()
        touched.setdefault((direction, name), set()).update(sectors)

    for program in programs:
        # Memory that no kernel has filled yet may overflow.
        with _watched(program, record), np.errstate(all="ignore"):
            run([launch._replace(num_programs=1)], next(iter(tensors.values())).device)
        for (direction, name), sectors in touched.items():
            getattr(traffic, direction)[name].sectors += len(sectors)
        touched.clear()
    return traffic


@contextmanager
def _watched(program: int, record: Any) -> Iterator[None]:
    """Have the interpreter run one program, reporting its loads and stores."""
    builder = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    set_grid_idx = builder.set_grid_idx

    def recorded_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        record("loads", ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def recorded_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("stores", ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    def set_program(self: Any, *_: int) -> None:
        self.grid_idx = (program, 0, 0)

    builder.create_masked_load, builder.create_masked_store = recorded_load, recorded_store
    builder.set_grid_idx = set_program
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.set_grid_idx = set_grid_idx


def _owner(tensors: dict[str, Tensor], addresses: np.ndarray) -> tuple[str, int]:
    """The name and item size of the tensor that all addresses lie in."""
    first, last = int(addresses.min()), int(addresses.max())
    for name, tensor in tensors.items():
        start = tensor.data_ptr()
        if start <= first and last < start + tensor.numel() * tensor.element_size():
            return name, tensor.element_size()
    raise IndexError(f"addresses {first:#x} to {last:#x} lie in none of {', '.join(tensors)}")
