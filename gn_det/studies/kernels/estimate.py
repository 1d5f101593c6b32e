"""An estimate of what group_norm takes on GPUs that are not here, from what is counted.

It is arithmetic over bytes, launches and programs, with :data:`ASSUMPTIONS`. The share of the
memory's peak and the cost of a launch are those of copies on an H200; nothing else was measured. Of
other implementations it takes the launches that their source has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gn_det.ops.form import FORMS, Form
from gn_det.studies.kernels.report import DTYPES, LAYOUTS, NUM_GROUPS, Case, launches_of

__all__ = [
    "ASSUMPTIONS",
    "CARDS",
    "Card",
    "Work",
    "bound_of",
    "card_of",
    "estimate_rows",
    "microseconds",
]


class Card(NamedTuple):
    """A GPU as its data sheet has it.

    Attributes:
        multiprocessors: their number.
        clock: of them in GHz, boosted.
        memory: its bandwidth in GB/s.
        cache: bytes of its L2 cache, of one half where it has two: both hold what all read.
        cache_speed: bandwidth of that in GB/s; an assumption.
        threads: that a multiprocessor holds.
    """

    multiprocessors: int
    clock: float
    memory: float
    cache: int
    cache_speed: float
    threads: int


CARDS = {
    "H200": Card(132, 1.755, 4800, 25 * 2**20, 5500, 2048),
    "H100": Card(132, 1.755, 3352, 25 * 2**20, 5500, 2048),
    "A100": Card(108, 1.410, 2039, 20 * 2**20, 4000, 2048),
    "L4": Card(58, 2.040, 300, 48 * 2**20, 1500, 1536),
    "RTX 4090": Card(128, 2.520, 1008, 72 * 2**20, 4500, 1536),
}

OF_PEAK = 0.85  # what copies on an H200 reach of the memory's bandwidth
SECONDS_TO_MEMORY = 630e-9  # from a load to its value, under load
BYTES_IN_FLIGHT = 32  # of a thread: two loads of 16
BYTES_A_CYCLE = 64  # between a multiprocessor and the cache
SECONDS_OF_LAUNCH = 2.7e-6  # its beginning and its end, behind another one; of the same copies
REGISTERS = 64 * 1024  # of a multiprocessor
ASSUMPTIONS = (
    f"Assumed: memory at {OF_PEAK:.0%} of its peak; {SECONDS_TO_MEMORY * 1e9:.0f} ns from a load "
    f"to its value, with {BYTES_IN_FLIGHT} bytes of each thread under way; {BYTES_A_CYCLE} bytes a "
    f"cycle and multiprocessor; {SECONDS_OF_LAUNCH * 1e6:.1f} µs for each launch, queued without a "
    "gap, so the host keeps up; what the launch before has touched is in the L2 cache where both "
    "fit into it. ATen's launches are those of its source; of torch.compile's the bytes are known, "
    "and are taken to fill the GPU."
)


class Work(NamedTuple):
    """One launch.

    Attributes:
        reads, writes: the whole tensors that it reads and writes; equal names are one tensor.
        programs: of the launch.
        threads: of a program.
        registers: of a thread.
    """

    reads: Sequence[str]
    writes: Sequence[str]
    programs: int
    threads: int
    registers: int = 64


def microseconds(works: Iterable[Work], tensor_bytes: int, card: Card) -> float:
    """What launches take, one after the other.

    Args:
        works: in their order.
        tensor_bytes: of a whole tensor.
        card: a GPU.
    """
    seconds, cached = 0.0, frozenset[str]()
    for work in works:
        touched = {*work.reads, *work.writes}
        from_cache = cached & {*work.reads}
        moved = (len(work.reads) + len(work.writes) - len(from_cache)) * tensor_bytes
        speed = _memory_speed(work, card)
        seconds += SECONDS_OF_LAUNCH + moved / speed
        seconds += len(from_cache) * tensor_bytes / min(card.cache_speed * 1e9, _drawn(work, card))
        fits = len(touched | cached) * tensor_bytes <= card.cache
        cached = frozenset(touched | cached) if fits else frozenset()
    return 1e6 * seconds


def bound_of(works: Iterable[Work], tensor_bytes: int, card: Card) -> float:
    """Microseconds for the bytes alone, at the memory's peak."""
    count = sum(len(work.reads) + len(work.writes) for work in works)
    return 1e-3 * count * tensor_bytes / card.memory


def _at_once(work: Work, card: Card) -> float:
    """Programs that run at once, over the waves of a launch."""
    held = min(card.threads // work.threads, REGISTERS // (work.threads * work.registers))
    slots = card.multiprocessors * max(1, held)
    return work.programs / math.ceil(work.programs / slots)


def _drawn(work: Work, card: Card) -> float:
    """Bytes a second that the multiprocessors at work can take in."""
    busy = min(_at_once(work, card), card.multiprocessors)
    return busy * BYTES_A_CYCLE * card.clock * 1e9


def _memory_speed(work: Work, card: Card) -> float:
    in_flight = _at_once(work, card) * work.threads * BYTES_IN_FLIGHT
    return min(card.memory * 1e9 * OF_PEAK, in_flight / SECONDS_TO_MEMORY, _drawn(work, card))


def _ours(case: Case, form: Form, dtype: str, layout: str) -> tuple[list[Work], list[Work]]:
    directions = launches_of(case.shape, form, DTYPES[dtype], LAYOUTS[layout])
    return tuple([_work(launch, case.shape) for launch in launches] for launches in directions)


def _work(launch: Any, shape: tuple[int, ...]) -> Work:
    names = launch.kernel.arg_names
    written = {"dx_ptr", "dz_ptr", "dresidual_ptr"} if "dy_ptr" in names else {"y_ptr"}
    whole = [
        name
        for name, argument in zip(names, launch.arguments, strict=False)
        if isinstance(argument, Tensor) and argument.shape == shape
    ]
    one_pass = "one_pass" in launch.kernel.__name__
    return Work(
        [name for name in whole if name not in written],
        [name for name in whole if name in written],
        launch.num_programs,
        launch.num_threads,
        128 if one_pass else 64,
    )


_ELEMENTS_OF_A_BLOCK = 4 * 128  # of ATen's kernels for elements


def _atens(case: Case, form: Form, layout: str) -> tuple[list[Work], list[Work]]:
    """ATen's launches: GN (two of them with a norm in the shortcut), addition, ReLU."""
    images, channels = case.shape[:2]
    elements = Work([], [], math.ceil(torch.Size(case.shape).numel() / _ELEMENTS_OF_A_BLOCK), 128)
    small = Work([], [], 1, 256)

    def copies(*names: str) -> list[Work]:
        if layout == "contiguous":
            return []
        return [elements._replace(reads=[name], writes=[f"{name} copied"]) for name in names]

    forward, backward = [], []
    if form.relu:
        backward.append(elements._replace(reads=["dy", "y"], writes=["dz"]))
    for x, y in (("x", "n"), ("r", "m"))[: 2 if form.normalize_add else 1]:
        moments = Work([x], [], images * NUM_GROUPS, 512)
        forward += copies(x)
        forward += [moments, small, elements._replace(reads=[x], writes=[y])]
        backward += copies("dz", x)
        backward += [Work(["dz", x], [], images * channels, 512), small, small]
        backward += [elements._replace(reads=["dz", x], writes=[f"d{x}"]), small]
    if form.add:
        added = ["n", "m" if form.normalize_add else "r"]
        forward.append(elements._replace(reads=added, writes=["s"]))
    if form.relu:
        forward.append(elements._replace(reads=["s" if form.add else "n"], writes=["y"]))
    return forward, backward


# Of torch.compile: bytes an element over those of a bfloat16, different tensors, launches.
_COMPILED = {"forward": (3.5, 2.5, 3), "backward": (10, 4, 5)}


def _compiled(direction: str, tensor_bytes: int, card: Card) -> float:
    """torch.compile's microseconds: all that it reads again comes from the cache, where it fits."""
    moved, different, launches = _COMPILED[direction]
    from_memory = different if different * tensor_bytes <= card.cache else moved
    seconds = from_memory * tensor_bytes / (card.memory * 1e9 * OF_PEAK)
    seconds += (moved - from_memory) * tensor_bytes / (card.cache_speed * 1e9)
    return 1e6 * (launches * SECONDS_OF_LAUNCH + seconds)


def estimate_rows(
    cases: Iterable[Case], form: str, dtype: str, layout: str, card: str
) -> list[dict[str, Any]]:
    """Estimated microseconds of each case on one of CARDS, ours beside the others'.

    Args:
        cases: see :func:`gn_det.studies.kernels.report.mask_rcnn_cases`.
        form, dtype, layout: keys of FORMS, DTYPES and LAYOUTS.
        card: key of CARDS.

    Returns:
        A row each: for both directions ours, as a multiple of the bytes at the memory's peak,
        ATen's, and torch.compile's where its launches are known (GN+ReLU, bf16).
    """
    gpu, rows = CARDS[card], []
    for case in cases:
        tensor_bytes = torch.Size(case.shape).numel() * DTYPES[dtype].itemsize
        ours = _ours(case, FORMS[form], dtype, layout)
        atens = _atens(case, FORMS[form], layout)
        row: dict[str, Any] = {"site": case.name}
        for direction, mine, theirs in zip(("forward", "backward"), ours, atens, strict=True):
            estimate = microseconds(mine, tensor_bytes, gpu)
            row[f"{direction} µs"] = estimate
            row[f"{direction} / bytes"] = estimate / bound_of(mine, tensor_bytes, gpu)
            row[f"ATen {direction} µs"] = microseconds(theirs, tensor_bytes, gpu)
            if form == "GN+ReLU" and dtype == "bf16" and layout == "contiguous":
                row[f"compiled {direction} µs"] = _compiled(direction, tensor_bytes, gpu)
        rows.append(row)
    return rows


def card_of(device_name: str) -> str | None:
    """The key of CARDS that a device's name has, such as "NVIDIA H100 80GB HBM3"; None for none."""
    return next((name for name in CARDS if name in device_name), None)
