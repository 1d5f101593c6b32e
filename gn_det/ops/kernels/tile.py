"""What one program sees of an image: a tile of channels × pixels, the same for both layouts.

A tile holds SEGMENTS whole groups of LANES channels each, LANES being the group's width padded to
a power of two; or, where a group is too wide for one tile, one of the group's PARTS (then SEGMENTS
is 1). Contiguous or channels_last only changes the offsets; which axis is read in 128-bit vectors
follows from them.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "SIZES",
    "fold",
    "load_parameter",
    "load_per_group",
    "marked_sizes",
    "normalize",
    "program_position",
    "relu",
    "spread",
    "sum_segments",
    "tile_channels",
    "tile_groups",
    "tile_offsets",
    "where_positive",
]

# Left unspecialised: image sizes vary all through training, and Triton would compile a kernel
# again for a size that is 1 and for one that 16 divides. What vectors need to know is VECTOR.
SIZES = [
    "num_samples",
    "num_groups",
    "num_channels",
    "num_pixels",
    "num_tiles",
    "num_splits",
    "split_blocks",
    "num_runs",
    "samples_per_run",
    "num_rows",
]


@triton.jit
def marked_sizes(num_channels, num_pixels, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """C and the pixels, unchanged, the contiguous one in a form that shows VECTOR divides it."""
    if CHANNELS_LAST:
        return num_channels // VECTOR * VECTOR, num_pixels
    else:
        return num_channels, num_pixels // VECTOR * VECTOR


@triton.jit
def program_position(num_tiles, num_splits):
    """The sample, split and tile of this program."""
    program = tl.program_id(0)
    return (
        program // num_tiles // num_splits,
        program // num_tiles % num_splits,
        program % num_tiles,
    )


@triton.jit
def tile_channels(
    tile,
    num_channels,
    CHANNELS_PER_GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The channel and group of each lane of a tile, and whether the lane holds a channel.

    Returns three vectors of SEGMENTS * LANES.
    """
    lane = tl.arange(0, SEGMENTS * LANES)
    if PARTS * LANES == CHANNELS_PER_GROUP:
        # No lane is padding, and the channels are one run: loads along it can be vectors.
        channel = tile * (SEGMENTS * LANES) + lane
        valid = channel < num_channels
        group = channel // CHANNELS_PER_GROUP
    else:
        segment = tile * SEGMENTS + lane // LANES
        channel_in_group = (segment % PARTS) * LANES + lane % LANES
        group = segment // PARTS
        channel = group * CHANNELS_PER_GROUP + channel_in_group
        valid = (channel_in_group < CHANNELS_PER_GROUP) & (channel < num_channels)
    return channel, group, valid


@triton.jit
def tile_groups(tile, num_groups, SEGMENTS: tl.constexpr, PARTS: tl.constexpr):
    """The group of each segment of a tile, and whether there is such a group."""
    group = (tile * SEGMENTS + tl.arange(0, SEGMENTS)) // PARTS
    return group, group < num_groups


@triton.jit
def tile_offsets(channel, pixel, num_channels, num_pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets (channels, pixels) into one sample, in the integer type of C and the pixels."""
    if CHANNELS_LAST:
        return pixel[None, :] * num_channels + channel[:, None]
    else:
        return channel[:, None] * num_pixels + pixel[None, :]


@triton.jit
def fold(per_channel, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """Sum a vector of SEGMENTS * LANES over the lanes of each segment: (SEGMENTS,)."""
    return tl.sum(tl.reshape(per_channel, [SEGMENTS, LANES]), axis=1)


@triton.jit
def sum_segments(tile, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """Sum a tile (SEGMENTS * LANES, columns) over all that belongs to each segment: (SEGMENTS,).

    Several segments are summed over columns first. Where they are reshaped to one axis instead,
    the threads of a segment are no neighbours, and Triton 3.3 to 3.7 adds those of others.
    """
    if SEGMENTS == 1:
        return tl.sum(tl.reshape(tile, [1, tile.shape[0] * tile.shape[1]]), axis=1)
    else:
        return fold(tl.sum(tile, axis=1), SEGMENTS, LANES)


@triton.jit
def spread(per_segment, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """Repeat a vector of SEGMENTS for each lane: (SEGMENTS * LANES,)."""
    if SEGMENTS == 1:
        return tl.full([LANES], 1.0, tl.float32) * tl.sum(per_segment, axis=0)  # one register
    else:
        repeated = tl.broadcast_to(per_segment[:, None], [SEGMENTS, LANES])
        return tl.reshape(repeated, [SEGMENTS * LANES])


@triton.jit
def load_per_group(ptr, tile, group, valid, SEGMENTS: tl.constexpr, PARTS: tl.constexpr):
    """A float32 of each lane's group, from G of them; one register where all lanes share it."""
    if SEGMENTS == 1:
        return tl.zeros(group.shape, tl.float32) + tl.load(ptr + tile // PARTS)
    else:
        return tl.load(ptr + group, valid, other=0.0)


@triton.jit
def load_parameter(ptr, channel, valid, DEFAULT: tl.constexpr):
    """γ or β of a tile's channels in float32; DEFAULT without affine parameters."""
    if ptr is None:
        return tl.full(channel.shape, DEFAULT, tl.float32)
    else:
        return tl.load(ptr + channel, valid, other=0.0).to(tl.float32)


@triton.jit
def normalize(centered, scale, bias):
    """Equations 1 and 6 of the paper for a tile of x - mean, with scale = rstd γ of its channels.

    The backward pass must find the same value to the bit for its ReLU mask. That is why product and
    sum are one explicit fma: left alone, the compiler may fuse them in one kernel and not in the
    other.
    """
    return tl.fma(centered, scale[:, None], bias)


@triton.jit
def relu(z):
    """max(z, 0) that lets NaN through, which tl.maximum would not."""
    return tl.where(z < 0, 0.0, z)


@triton.jit
def where_positive(values, z, DTYPE: tl.constexpr):
    """values where the output stored for z is positive, else 0: a positive z may round to 0."""
    return tl.where(z.to(DTYPE).to(tl.float32) > 0, values, 0.0)
