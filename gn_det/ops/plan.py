"""How a shape is cut into programs: plain arithmetic, the same for the launch, tests and benchmark.

One pass where a group fits into a program's registers, otherwise two launches over splits of the
pixels. The tile is channels × pixels; see kernels/tile.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Plan", "make_plan"]

# Four programs for each of the 132 multiprocessors of an H100, resident at once if a thread takes
# 64 registers, and never more than that, as a last wave costs what a full one does. On an H200 they
# were up to a fifth faster than two, which by the data sheet have enough bytes in flight.
TARGET_PROGRAMS = 4 * 132

# Elements of a thread: one 128-bit load of bfloat16, two of float32, and few enough for three
# tensors or accumulators to stay in registers.
ELEMENTS_PER_THREAD = 8

# Elements of a thread of the one-pass forward, which holds one tensor or two. Twice as many, and
# half the threads to wait for at each sum, took an H200 0.6 to 1 times as long.
ONE_PASS_ELEMENTS = 16

# Threads of a program that holds whole groups, at most: each can have 128 registers then.
ONE_PASS_THREADS = 512

# Elements of a split's tile: 256 threads.
SPLIT_TILE = 2048

# Rows of pixels in one thread of the one-pass backward, and at most. Without vectors, every element
# of a thread lies in another row, with its own address and six sums and parameters of its channel.
ROWS_PER_THREAD = 2
MAX_ROWS_PER_THREAD = 4

# Channels of a split's tile where rows of pixels are contiguous: 16 leave rows of 128 pixels, long
# enough that the sectors at their unaligned ends do not count.
MAX_LANES = 16

# Bytes of a split's tile along channels where those are contiguous: what memory fetches at once,
# or one 32-byte sector where 64 would leave too few programs, or too many groups in each, whose
# partials of all splits every program of the second launch reads.
RUN_BYTES = (64, 32)
MAX_SEGMENTS = 4

# Partials of a group, which every program of the second launch reads at once, at most; more where
# the groups are so few, such as one in an image, that these would not make TARGET_PROGRAMS.
MAX_ENTRIES = 128

# Threads of a program, at least: a wave of AMD's, two warps of NVIDIA's.
WAVE = 64

# Threads of the whole one-pass backward: samples beyond are taken in turn, and leave fewer partial
# sums of γ and β. As many as 132 multiprocessors can hold.
GRADIENT_THREADS = 132 * 2048

# Samples that are always one run: it leaves no partial sums, and the launch that would add them
# costs more than a second sample of a small group.
ONE_RUN = 2


@dataclass(frozen=True)
class Plan:
    """The cut of one (N, C, pixels) tensor.

    Attributes:
        num_samples, num_channels, num_groups, num_pixels: N, C, G and H·W.
        channels_last: whether channels are the contiguous axis.
        one_pass: whether a group fits into a program; splits and parts are 1 then.
        segments: groups in a tile.
        lanes: channels of a group in a tile, padded to a power of two.
        parts: tiles that a group's channels take.
        block_pixels: pixels of a tile, a power of two.
        vector: largest power of two up to 16 bytes of elements that divides the contiguous axis.
        split_blocks: blocks of pixels that a program takes in turn.
        num_threads: threads of a program.
        samples_per_run: samples that a program of the one-pass backward takes in turn.
    """

    num_samples: int
    num_channels: int
    num_groups: int
    num_pixels: int
    channels_last: bool
    one_pass: bool
    segments: int
    lanes: int
    parts: int
    block_pixels: int
    vector: int
    split_blocks: int
    num_threads: int
    samples_per_run: int

    @property
    def channels_per_group(self) -> int:
        return self.num_channels // self.num_groups

    @property
    def num_tiles(self) -> int:
        """Tiles of channels."""
        return math.ceil(self.num_groups * self.parts / self.segments)

    @property
    def num_splits(self) -> int:
        return math.ceil(self.num_pixels / (self.split_blocks * self.block_pixels))

    @property
    def num_programs(self) -> int:
        """Programs of each launch over the tensor; the one-pass backward has fewer."""
        return self.num_samples * self.num_tiles * self.num_splits

    @property
    def max_entries(self) -> int:
        """Partials of a group at most, a power of two."""
        return _max_entries(self.num_samples * self.num_groups)

    @property
    def num_runs(self) -> int:
        """Runs of samples in the one-pass backward."""
        return math.ceil(self.num_samples / self.samples_per_run)


def make_plan(
    num_samples: int,
    num_channels: int,
    num_pixels: int,
    num_groups: int,
    itemsize: int,
    channels_last: bool,
    backward: bool,
) -> Plan:
    """The cut for a shape.

    The directions differ where a group fits into the registers of the forward pass only.

    Args:
        num_samples, num_channels, num_pixels: N, C and H · W of the input.
        num_groups: G, which divides C.
        itemsize: bytes of an element of the input.
        channels_last: whether the channels of a pixel lie beside each other in memory.
        backward: whether the cut is for the backward pass.
    """
    channels_per_group = num_channels // num_groups
    channels_last = channels_last or num_pixels == 1  # the same addresses, read along channels
    vector = math.gcd(num_channels if channels_last else num_pixels, 16 // itemsize)
    lanes = _power_of_two(channels_per_group)
    one_run = _power_of_two(math.ceil(RUN_BYTES[-1] / itemsize / lanes)) if channels_last else 1
    segments = min(one_run, _power_of_two(num_groups))
    block_pixels = _power_of_two(num_pixels)
    shape = (num_samples, num_channels, num_groups, num_pixels, channels_last)

    tile = segments * lanes * block_pixels
    elements, most = ONE_PASS_ELEMENTS, ELEMENTS_PER_THREAD
    if backward:
        elements = min(ELEMENTS_PER_THREAD, ROWS_PER_THREAD * vector)
        most = min(ELEMENTS_PER_THREAD, MAX_ROWS_PER_THREAD * vector)
    if tile <= ONE_PASS_THREADS * most:
        num_threads = min(ONE_PASS_THREADS, max(WAVE, tile // elements))
        runs = max(1, GRADIENT_THREADS // (num_threads * math.ceil(num_groups / segments)))
        return Plan(
            *shape,
            one_pass=True,
            segments=segments,
            lanes=lanes,
            parts=1,
            block_pixels=block_pixels,
            vector=vector,
            split_blocks=1,
            num_threads=num_threads,
            samples_per_run=max(1, num_samples if num_samples <= ONE_RUN else num_samples // runs),
        )

    entries = _max_entries(num_samples * num_groups)
    for run_bytes in RUN_BYTES:
        channels = run_bytes // itemsize if channels_last else MAX_LANES
        least = _power_of_two(math.ceil(channels_per_group / entries))
        lanes = max(least, min(_power_of_two(channels_per_group), channels))
        parts = math.ceil(channels_per_group / lanes)
        segments = max(1, channels // lanes) if channels_last and parts == 1 else 1
        segments = min(segments, _power_of_two(num_groups))
        columns = num_samples * math.ceil(num_groups * parts / segments)
        max_splits = entries // parts
        enough = min(TARGET_PROGRAMS, num_samples * num_groups * parts * max_splits)
        if segments <= MAX_SEGMENTS and columns * max_splits >= enough:
            break
    block_pixels = max(1, min(block_pixels, SPLIT_TILE // (segments * lanes)))
    splits = min(max_splits, max(1, TARGET_PROGRAMS // max(1, columns)))
    blocks = math.ceil(num_pixels / block_pixels)
    return Plan(
        *shape,
        one_pass=False,
        segments=segments,
        lanes=lanes,
        parts=parts,
        block_pixels=block_pixels,
        vector=vector,
        split_blocks=max(1, math.ceil(blocks / splits)),
        num_threads=max(WAVE, segments * lanes * block_pixels // ELEMENTS_PER_THREAD),
        samples_per_run=1,
    )


def _max_entries(groups: int) -> int:
    """For so many groups of all samples together; a power of two."""
    programs = max(1, TARGET_PROGRAMS // max(1, groups))
    return max(MAX_ENTRIES, 1 << (programs.bit_length() - 1))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
