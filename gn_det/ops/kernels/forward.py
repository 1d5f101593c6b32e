"""Forward kernels: one pass where a group fits into registers, else statistics, then apply.

Every kernel runs on a one-dimensional grid over (sample, split of the pixels, tile of channels),
the tile fastest: in channels_last, programs that share cache lines run at the same time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gn_det.ops.kernels.tile import (
    SIZES,
    load_parameter,
    marked_sizes,
    normalize,
    program_position,
    relu,
    spread,
    sum_segments,
    tile_channels,
    tile_groups,
    tile_offsets,
)

__all__ = ["apply_kernel", "one_pass_kernel", "statistics_kernel"]


@triton.jit
def merge_moments(count, mean, m2, total, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """Merge the sets of each segment, given count, mean and Σ(x - mean)² (Chan et al. 1983).

    The arguments are tiles (SEGMENTS * LANES, columns), and total is the sum of the counts of each
    segment. The merged mean is found twice, the second time from the differences to the first, so
    that it carries one rounding and not those of the sum: at a mean of 10⁴ σ one float32 step of
    the mean is 10⁻³ σ.

    Returns the mean and Σ(x - mean)² per segment.
    """
    center = sum_segments(count * mean, SEGMENTS, LANES) / total
    delta = tl.where(count > 0, mean - spread(center, SEGMENTS, LANES)[:, None], 0.0)
    shift = sum_segments(count * delta, SEGMENTS, LANES) / total
    m2 = sum_segments(m2 + count * delta * delta, SEGMENTS, LANES) - total * shift * shift
    return center + shift, relu(m2)


@triton.jit
def reciprocal_deviation(m2, group_size, eps):
    """1/√(variance + eps); NaN where the variance overflows, as a zero would hide that."""
    variance = m2 / group_size
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return tl.where(variance == float("inf"), float("nan"), rstd)


@triton.jit(do_not_specialize=SIZES)
def one_pass_kernel(
    x_ptr,  # (N, C, pixels), as are y and the residual
    y_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (C,) or None, as are all parameters
    bias_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    statistics_ptr,  # (2 or 4, N, G): mean and rstd of x, then of the residual
    eps,
    num_samples,
    num_groups,
    num_channels,
    num_pixels,
    num_tiles,
    CHANNELS_PER_GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """Statistics and output of SEGMENTS groups that stay in registers between the two."""
    num_channels, num_pixels = marked_sizes(num_channels, num_pixels, VECTOR, CHANNELS_LAST)
    sample, _, tile = program_position(num_tiles, 1)
    channel, _, valid = tile_channels(tile, num_channels, CHANNELS_PER_GROUP, SEGMENTS, LANES, 1)
    pixel = tl.arange(0, BLOCK_PIXELS)
    mask = valid[:, None] & (pixel < num_pixels)[None, :]
    offsets = tile_offsets(channel, pixel, num_channels, num_pixels, CHANNELS_LAST)
    base = sample.to(tl.int64) * num_channels * num_pixels
    group, group_valid = tile_groups(tile, num_groups, SEGMENTS, 1)
    statistics = statistics_ptr + sample * num_groups + group
    stride = num_samples * num_groups

    x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
    mean, rstd = group_statistics(x, mask, num_pixels, eps, CHANNELS_PER_GROUP, SEGMENTS, LANES)
    tl.store(statistics, mean, group_valid)
    tl.store(statistics + stride, rstd, group_valid)
    centered = x - spread(mean, SEGMENTS, LANES)[:, None]
    weight = load_parameter(weight_ptr, channel, valid, 1.0)
    scale = spread(rstd, SEGMENTS, LANES) * weight
    shift = load_parameter(bias_ptr, channel, valid, 0.0)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        if NORMALIZE_RESIDUAL:
            mean, rstd = group_statistics(
                residual, mask, num_pixels, eps, CHANNELS_PER_GROUP, SEGMENTS, LANES
            )
            tl.store(statistics + 2 * stride, mean, group_valid)
            tl.store(statistics + 3 * stride, rstd, group_valid)
            residual -= spread(mean, SEGMENTS, LANES)[:, None]
            weight = load_parameter(residual_weight_ptr, channel, valid, 1.0)
            shift += load_parameter(residual_bias_ptr, channel, valid, 0.0)[:, None]
            shift = normalize(residual, spread(rstd, SEGMENTS, LANES) * weight, shift)
        else:
            shift += residual
    y = normalize(centered, scale, shift)
    if RELU:
        y = relu(y)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def group_statistics(
    x,
    mask,
    num_pixels,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Mean and rstd of SEGMENTS whole groups that a tile holds: each element is a set of one."""
    group_size = CHANNELS_PER_GROUP * num_pixels.to(tl.float32)
    mean, m2 = merge_moments(mask.to(tl.float32), x, 0.0, group_size, SEGMENTS, LANES)
    return mean, reciprocal_deviation(m2, group_size, eps)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr,  # (N, C, pixels)
    residual_ptr,  # of x's shape and normalized too, or None
    partials_ptr,  # (2 or 4, N, G, splits * PARTS): mean and Σ(x - mean)² of x, then the residual
    num_samples,
    num_groups,
    num_channels,
    num_pixels,
    num_tiles,
    num_splits,
    split_blocks,
    CHANNELS_PER_GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Moments of each group over one split of the pixels; the residual's samples follow x's."""
    num_channels, num_pixels = marked_sizes(num_channels, num_pixels, VECTOR, CHANNELS_LAST)
    sample, split, tile = program_position(num_tiles, num_splits)
    channel, _, valid = tile_channels(
        tile, num_channels, CHANNELS_PER_GROUP, SEGMENTS, LANES, PARTS
    )
    group, group_valid = tile_groups(tile, num_groups, SEGMENTS, PARTS)
    base = sample % num_samples * num_channels.to(tl.int64) * num_pixels
    if residual_ptr is not None:  # noqa: SIM102, this one is decided at compile time
        if sample >= num_samples:
            x_ptr = residual_ptr
    mean, m2 = split_moments(
        x_ptr + base, channel, valid, split, split_blocks, num_channels, num_pixels,
        SEGMENTS, LANES, BLOCK_PIXELS, CHANNELS_LAST,
    )  # fmt: skip
    entries = num_splits * PARTS
    tensor_stride = num_samples * num_groups * entries
    partials = (
        partials_ptr
        + sample // num_samples * 2 * tensor_stride
        + (sample % num_samples * num_groups + group) * entries
        + split * PARTS
        + tile % PARTS
    )
    tl.store(partials, mean, group_valid)
    tl.store(partials + tensor_stride, m2, group_valid)


@triton.jit
def split_moments(
    ptr,
    channel,
    valid,
    split,
    split_blocks,
    num_channels,
    num_pixels,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Moments of SEGMENTS over one split: Welford's update in each lane, and one merge at the end.

    A lane's update is four operations an element with no exchange between threads, where reducing
    every tile on its own would stop the loads for its barriers.
    """
    first = split * split_blocks * BLOCK_PIXELS
    last = tl.minimum(first + split_blocks * BLOCK_PIXELS, num_pixels)
    lane = tl.arange(0, BLOCK_PIXELS)
    mean = tl.zeros([channel.shape[0], BLOCK_PIXELS], tl.float32)
    m2 = tl.zeros([channel.shape[0], BLOCK_PIXELS], tl.float32)
    blocks_done = 0.0
    for start in tl.range(first, last, BLOCK_PIXELS, loop_unroll_factor=2):
        pixel = start + lane
        mask = valid[:, None] & (pixel < num_pixels)[None, :]
        offsets = tile_offsets(
            channel, pixel, num_channels.to(tl.int64), num_pixels.to(tl.int64), CHANNELS_LAST
        )
        x = tl.load(ptr + offsets, mask, other=0.0).to(tl.float32)
        blocks_done += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / blocks_done)
        m2 += delta * (x - mean)

    lane_count = (last - first - lane + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    count = tl.where(valid[:, None], lane_count.to(tl.float32)[None, :], 0.0)
    total = tl.maximum(sum_segments(count, SEGMENTS, LANES), 1.0)
    return merge_moments(count, mean, m2, total, SEGMENTS, LANES)


@triton.jit
def merge_partials(
    partials_ptr,
    stride,
    group,
    group_valid,
    num_splits,
    split_pixels,
    num_pixels,
    eps,
    CHANNELS_PER_GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_ENTRIES: tl.constexpr,
):
    """Mean and rstd of groups from their partials, in a fixed order: every program finds the same.

    partials_ptr is that of the sample, (G, splits * PARTS); Σ(x - mean)² lies stride behind.
    """
    entry = tl.arange(0, MAX_ENTRIES)
    entries = num_splits * PARTS
    pixels = tl.minimum(num_pixels - entry // PARTS * split_pixels, split_pixels)
    channels = tl.minimum(CHANNELS_PER_GROUP - entry % PARTS * LANES, LANES)
    mask = group_valid[:, None] & (entry < entries)[None, :]
    count = tl.where(mask, (pixels.to(tl.float32) * channels)[None, :], 0.0)
    ptrs = partials_ptr + group[:, None] * entries + entry[None, :]
    mean = tl.load(ptrs, mask, other=0.0)
    m2 = tl.load(ptrs + stride, mask, other=0.0)
    group_size = CHANNELS_PER_GROUP * num_pixels.to(tl.float32)
    mean, m2 = merge_moments(count, mean, m2, group_size, count.shape[0], 1)
    return mean, reciprocal_deviation(m2, group_size, eps)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x_ptr,  # (N, C, pixels), as are y and the residual
    y_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (C,) or None, as are all parameters
    bias_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    partials_ptr,  # of statistics_kernel
    statistics_ptr,  # (2 or 4, N, G): mean and rstd of x, then of the residual
    eps,
    num_samples,
    num_groups,
    num_channels,
    num_pixels,
    num_tiles,
    num_splits,
    split_blocks,
    CHANNELS_PER_GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    MAX_ENTRIES: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """Merge the partials of the tile's groups and write the output of one split of the pixels."""
    num_channels, num_pixels = marked_sizes(num_channels, num_pixels, VECTOR, CHANNELS_LAST)
    sample, split, tile = program_position(num_tiles, num_splits)
    channel, _, valid = tile_channels(
        tile, num_channels, CHANNELS_PER_GROUP, SEGMENTS, LANES, PARTS
    )
    base = sample.to(tl.int64) * num_channels * num_pixels
    group, group_valid = tile_groups(tile, num_groups, SEGMENTS, PARTS)
    first_of_group = group_valid & (split == 0) & (tile % PARTS == 0)
    statistics = statistics_ptr + sample * num_groups + group
    stride = num_samples * num_groups
    partials = partials_ptr + sample * num_groups * num_splits * PARTS
    partials_stride = stride * num_splits * PARTS
    split_pixels = split_blocks * BLOCK_PIXELS

    mean, rstd = merge_partials(
        partials, partials_stride, group, group_valid, num_splits, split_pixels, num_pixels, eps,
        CHANNELS_PER_GROUP, LANES, PARTS, MAX_ENTRIES,
    )  # fmt: skip
    tl.store(statistics, mean, first_of_group)
    tl.store(statistics + stride, rstd, first_of_group)
    mean = spread(mean, SEGMENTS, LANES)[:, None]
    weight = load_parameter(weight_ptr, channel, valid, 1.0)
    scale = spread(rstd, SEGMENTS, LANES) * weight
    bias = load_parameter(bias_ptr, channel, valid, 0.0)[:, None]
    if NORMALIZE_RESIDUAL:
        residual_mean, rstd = merge_partials(
            partials + 2 * partials_stride, partials_stride, group, group_valid,
            num_splits, split_pixels, num_pixels, eps,
            CHANNELS_PER_GROUP, LANES, PARTS, MAX_ENTRIES,
        )  # fmt: skip
        tl.store(statistics + 2 * stride, residual_mean, first_of_group)
        tl.store(statistics + 3 * stride, rstd, first_of_group)
        residual_mean = spread(residual_mean, SEGMENTS, LANES)[:, None]
        weight = load_parameter(residual_weight_ptr, channel, valid, 1.0)
        residual_scale = spread(rstd, SEGMENTS, LANES) * weight
        bias += load_parameter(residual_bias_ptr, channel, valid, 0.0)[:, None]

    first = split * split_pixels
    num_blocks = tl.cdiv(tl.minimum(split_pixels, num_pixels - first), BLOCK_PIXELS)
    for block in tl.range(num_blocks, loop_unroll_factor=2):
        # Backwards: the pixels that statistics_kernel read last are those still in the cache.
        pixel = first + (num_blocks - 1 - block) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        mask = valid[:, None] & (pixel < num_pixels)[None, :]
        offsets = base + tile_offsets(
            channel, pixel, num_channels.to(tl.int64), num_pixels.to(tl.int64), CHANNELS_LAST
        )
        x = tl.load(x_ptr + offsets, mask, other=0.0).to(tl.float32)
        shift = bias
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
            if NORMALIZE_RESIDUAL:
                shift = normalize(residual - residual_mean, residual_scale, shift)
            else:
                shift += residual
        y = normalize(x - mean, scale, shift)
        if RELU:
            y = relu(y)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)
