"""Backward kernels: one pass where a group fits into registers, else sums, then apply.

With dz the gradient of the output before ReLU and D the group's size, per sample

    dβ = Σ dz,  dγ = Σ dz x̂                           over the pixels of a channel
    dx = rstd (γ dz - c1 - x̂ c2)                      c1 = Σ γ dβ / D,  c2 = Σ γ dγ / D  of a group

The sums are of x̂, already centred: Σ dz x and mean Σ dz, which other implementations subtract,
cancel where the mean is large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gn_det.ops.kernels.tile import (
    SIZES,
    fold,
    load_parameter,
    load_per_group,
    marked_sizes,
    normalize,
    program_position,
    spread,
    tile_channels,
    tile_groups,
    tile_offsets,
    where_positive,
)

__all__ = [
    "apply_gradients_kernel",
    "gradient_sums_kernel",
    "one_pass_gradients_kernel",
    "reduce_gradients_kernel",
]


# Rows of partials that apply_gradients_kernel reads at once: as many as one or two images of 32
# groups have, and few enough to take no more registers than its loop over pixels. One or two images
# of a single group have up to 512.
SUMMED_ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit
def load_gradient(dy_ptr, y_ptr, dz_ptr, base, offsets, mask):
    """dy, through the ReLU's mask where the output y was kept for it; dz is then written too."""
    dy = tl.load(dy_ptr + base + offsets, mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dy = tl.where(y > 0, dy, 0.0)
        tl.store(dz_ptr + base + offsets, dy.to(dz_ptr.dtype.element_ty), mask)
    return dy


@triton.jit
def input_gradient(dz, centered, scale, rstd, c1, c2):
    """dx of a tile, scale = rstd γ to c2 being vectors of its channels."""
    offset = rstd * c1
    slope = rstd * rstd * c2
    return scale[:, None] * dz - (offset[:, None] + centered * slope[:, None])


@triton.jit(do_not_specialize=SIZES)
def one_pass_gradients_kernel(
    dy_ptr,  # (N, C, pixels), as are all but parameters, statistics and partials
    x_ptr,
    dx_ptr,
    y_ptr,  # where ReLU's mask needs the output, and dz with it; or None
    dz_ptr,
    residual_ptr,  # normalized too, and its gradient; or None
    dresidual_ptr,
    weight_ptr,  # (C,) or None, as are all parameters
    bias_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    statistics_ptr,  # (2 or 4, N, G)
    partials_ptr,  # (2 or 4, runs of samples, C): of dγ and dβ, then of the residual's
    num_samples,
    num_groups,
    num_channels,
    num_pixels,
    num_tiles,
    num_runs,
    samples_per_run,
    CHANNELS_PER_GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
):
    """All gradients of SEGMENTS groups in a run of samples, one sample after the other.

    What is read for each channel is loaded where it is used, again if need be: held from one use to
    the next, it would take the registers that the tiles need.
    """
    num_channels, num_pixels = marked_sizes(num_channels, num_pixels, VECTOR, CHANNELS_LAST)
    _, run, tile = program_position(num_tiles, num_runs)
    channel, group, valid = tile_channels(
        tile, num_channels, CHANNELS_PER_GROUP, SEGMENTS, LANES, 1
    )
    pixel = tl.arange(0, BLOCK_PIXELS)
    mask = valid[:, None] & (pixel < num_pixels)[None, :]
    offsets = tile_offsets(channel, pixel, num_channels, num_pixels, CHANNELS_LAST)
    stride = num_samples * num_groups
    inverse_size = 1.0 / (CHANNELS_PER_GROUP * num_pixels.to(tl.float32))
    dweight = tl.zeros([SEGMENTS * LANES], tl.float32)
    dbias = tl.zeros([SEGMENTS * LANES], tl.float32)
    dresidual_weight = tl.zeros([SEGMENTS * LANES], tl.float32)

    first = run * samples_per_run
    for sample in range(first, tl.minimum(first + samples_per_run, num_samples)):
        base = sample * num_channels.to(tl.int64) * num_pixels
        mean_ptr = statistics_ptr + sample * num_groups
        rstd_ptr = mean_ptr + stride
        x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dz = load_gradient(dy_ptr, y_ptr, dz_ptr, base, offsets, mask)
        centered = x - load_per_group(mean_ptr, tile, group, valid, SEGMENTS, 1)[:, None]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + base + offsets, mask, other=0.0).to(tl.float32)
            mean = load_per_group(mean_ptr + 2 * stride, tile, group, valid, SEGMENTS, 1)
            residual_centered = residual - mean[:, None]
        if RELU and y_ptr is None:
            shift = load_parameter(bias_ptr, channel, valid, 0.0)[:, None]
            if residual_ptr is not None:
                shift += load_parameter(residual_bias_ptr, channel, valid, 0.0)[:, None]
                weight = load_parameter(residual_weight_ptr, channel, valid, 1.0)
                rstd = load_per_group(rstd_ptr + 2 * stride, tile, group, valid, SEGMENTS, 1)
                shift = normalize(residual_centered, rstd * weight, shift)
            weight = load_parameter(weight_ptr, channel, valid, 1.0)
            rstd = load_per_group(rstd_ptr, tile, group, valid, SEGMENTS, 1)
            y = normalize(centered, rstd * weight, shift)
            dz = where_positive(dz, y, dy_ptr.dtype.element_ty)

        dz_sum = tl.sum(dz, axis=1)
        dbias += dz_sum
        rstd = load_per_group(rstd_ptr, tile, group, valid, SEGMENTS, 1)
        weight = load_parameter(weight_ptr, channel, valid, 1.0)
        dx, dz_x_sum = whole_group_gradients(
            dz, dz_sum, centered, rstd, weight, inverse_size, SEGMENTS, LANES
        )
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
        dweight += dz_x_sum
        if residual_ptr is not None:
            rstd = load_per_group(rstd_ptr + 2 * stride, tile, group, valid, SEGMENTS, 1)
            weight = load_parameter(residual_weight_ptr, channel, valid, 1.0)
            dx, dz_x_sum = whole_group_gradients(
                dz, dz_sum, residual_centered, rstd, weight, inverse_size, SEGMENTS, LANES
            )
            tl.store(dresidual_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
            dresidual_weight += dz_x_sum

    partials = partials_ptr + run * num_channels + channel
    stride = num_runs * num_channels
    tl.store(partials, dweight, valid)
    tl.store(partials + stride, dbias, valid)
    if residual_ptr is not None:
        tl.store(partials + 2 * stride, dresidual_weight, valid)
        tl.store(partials + 3 * stride, dbias, valid)


@triton.jit
def whole_group_gradients(
    dz,
    dz_sum,
    centered,
    rstd,
    weight,
    inverse_size,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """dx of a tile that holds whole groups, and Σ dz x̂ of its channels."""
    dz_x_sum = rstd * tl.sum(dz * centered, axis=1)
    c1 = spread(fold(weight * dz_sum, SEGMENTS, LANES), SEGMENTS, LANES) * inverse_size
    c2 = spread(fold(weight * dz_x_sum, SEGMENTS, LANES), SEGMENTS, LANES) * inverse_size
    return input_gradient(dz, centered, rstd * weight, rstd, c1, c2), dz_x_sum


@triton.jit(do_not_specialize=SIZES)
def gradient_sums_kernel(
    dy_ptr,  # (N, C, pixels), as are all but parameters, statistics and partials
    x_ptr,
    y_ptr,  # where ReLU's mask needs the output, and dz with it; or None
    dz_ptr,
    residual_ptr,  # normalized too, or None
    weight_ptr,  # (C,) or None, as are all parameters
    bias_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    statistics_ptr,  # (2 or 4, N, G)
    partials_ptr,  # (2 or 3, N * splits, C): of dγ and dβ, then of the residual's dγ
    coefficients_ptr,  # (2 or 4, N, G, splits * PARTS): Σ γ dz, Σ γ dz x̂, then of the residual
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
    RELU: tl.constexpr,
):
    """Sums over one split of the pixels, in each lane first, then across lanes and channels."""
    num_channels, num_pixels = marked_sizes(num_channels, num_pixels, VECTOR, CHANNELS_LAST)
    sample, split, tile = program_position(num_tiles, num_splits)
    channel, group, valid = tile_channels(
        tile, num_channels, CHANNELS_PER_GROUP, SEGMENTS, LANES, PARTS
    )
    base = sample.to(tl.int64) * num_channels * num_pixels
    statistics = statistics_ptr + sample * num_groups
    stride = num_samples * num_groups
    mean = load_per_group(statistics, tile, group, valid, SEGMENTS, PARTS)
    rstd = load_per_group(statistics + stride, tile, group, valid, SEGMENTS, PARTS)
    if residual_ptr is not None:
        statistics += 2 * stride
        residual_mean = load_per_group(statistics, tile, group, valid, SEGMENTS, PARTS)
        residual_rstd = load_per_group(statistics + stride, tile, group, valid, SEGMENTS, PARTS)
    if RELU and y_ptr is None:
        scale = rstd * load_parameter(weight_ptr, channel, valid, 1.0)
        bias = load_parameter(bias_ptr, channel, valid, 0.0)
        if residual_ptr is not None:
            weight = load_parameter(residual_weight_ptr, channel, valid, 1.0)
            residual_scale = residual_rstd * weight
            bias += load_parameter(residual_bias_ptr, channel, valid, 0.0)

    dz_sum = tl.zeros([channel.shape[0], BLOCK_PIXELS], tl.float32)
    dz_x_sum = tl.zeros([channel.shape[0], BLOCK_PIXELS], tl.float32)
    if residual_ptr is not None:
        dz_residual_sum = tl.zeros([channel.shape[0], BLOCK_PIXELS], tl.float32)
    first = split * split_blocks * BLOCK_PIXELS
    last = tl.minimum(first + split_blocks * BLOCK_PIXELS, num_pixels)
    for start in tl.range(first, last, BLOCK_PIXELS, loop_unroll_factor=2):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        mask = valid[:, None] & (pixel < num_pixels)[None, :]
        offsets = tile_offsets(
            channel, pixel, num_channels.to(tl.int64), num_pixels.to(tl.int64), CHANNELS_LAST
        )
        x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dz = load_gradient(dy_ptr, y_ptr, dz_ptr, base, offsets, mask)
        centered = x - mean[:, None]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + base + offsets, mask, other=0.0).to(tl.float32)
            residual_centered = residual - residual_mean[:, None]
        if RELU and y_ptr is None:
            shift = bias[:, None]
            if residual_ptr is not None:
                shift = normalize(residual_centered, residual_scale, shift)
            dz = where_positive(dz, normalize(centered, scale, shift), dy_ptr.dtype.element_ty)
        dz_sum += dz
        dz_x_sum += dz * centered
        if residual_ptr is not None:
            dz_residual_sum += dz * residual_centered

    partials = partials_ptr + (sample * num_splits + split) * num_channels + channel
    partials_stride = num_samples * num_splits * num_channels
    segment_group, segment_valid = tile_groups(tile, num_groups, SEGMENTS, PARTS)
    entries = num_splits * PARTS
    coefficients = coefficients_ptr + (sample * num_groups + segment_group) * entries
    coefficients += split * PARTS + tile % PARTS
    coefficients_stride = stride * entries
    dbias = tl.sum(dz_sum, axis=1)
    dweight = rstd * tl.sum(dz_x_sum, axis=1)
    tl.store(partials, dweight, valid)
    tl.store(partials + partials_stride, dbias, valid)
    weight = load_parameter(weight_ptr, channel, valid, 1.0)
    tl.store(coefficients, fold(weight * dbias, SEGMENTS, LANES), segment_valid)
    coefficients += coefficients_stride
    tl.store(coefficients, fold(weight * dweight, SEGMENTS, LANES), segment_valid)
    if residual_ptr is not None:
        dweight = residual_rstd * tl.sum(dz_residual_sum, axis=1)
        tl.store(partials + 2 * partials_stride, dweight, valid)
        weight = load_parameter(residual_weight_ptr, channel, valid, 1.0)
        coefficients += coefficients_stride
        tl.store(coefficients, fold(weight * dbias, SEGMENTS, LANES), segment_valid)
        coefficients += coefficients_stride
        tl.store(coefficients, fold(weight * dweight, SEGMENTS, LANES), segment_valid)


@triton.jit(do_not_specialize=SIZES)
def reduce_gradients_kernel(
    partials_ptr,  # (2 or 4, rows, C)
    dparameters_ptr,  # (2 or 4, C): dγ and dβ of x, then of the residual
    num_channels,
    num_rows,
    num_tiles,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Sum the partials of one-pass programs in a fixed order, without atomics."""
    plane, _, tile = program_position(num_tiles, 1)
    channel = tile * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    valid = channel < num_channels
    partials = partials_ptr + plane.to(tl.int64) * num_rows * num_channels
    total = sum_rows(partials, channel, valid, num_rows, num_channels, BLOCK_ROWS)
    tl.store(dparameters_ptr + plane * num_channels + channel, total, valid)


@triton.jit
def sum_rows(ptr, channel, valid, num_rows, num_channels, BLOCK_ROWS: tl.constexpr):
    """Column sums of (rows, C) for the channels of a tile."""
    total = tl.zeros([BLOCK_ROWS, channel.shape[0]], tl.float32)
    for start in range(0, num_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num_rows)[:, None] & valid[None, :]
        total += tl.load(ptr + row[:, None] * num_channels + channel[None, :], mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def merge_coefficients(
    ptr,
    stride,
    group,
    group_valid,
    entries,
    inverse_size,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    MAX_ENTRIES: tl.constexpr,
):
    """c1 and c2 of each lane's group, from the sums of its splits and parts in a fixed order.

    ptr is that of the sample, (G, entries); the sums for c2 lie stride behind.
    """
    entry = tl.arange(0, MAX_ENTRIES)
    mask = group_valid[:, None] & (entry < entries)[None, :]
    ptrs = ptr + group[:, None] * entries + entry[None, :]
    c1 = tl.sum(tl.load(ptrs, mask, other=0.0), axis=1) * inverse_size
    c2 = tl.sum(tl.load(ptrs + stride, mask, other=0.0), axis=1) * inverse_size
    return spread(c1, SEGMENTS, LANES), spread(c2, SEGMENTS, LANES)


@triton.jit(do_not_specialize=SIZES)
def apply_gradients_kernel(
    dy_ptr,  # (N, C, pixels), as are x, the residual and their gradients; may be dz
    x_ptr,
    dx_ptr,
    residual_ptr,  # normalized too, and its gradient; or None
    dresidual_ptr,
    weight_ptr,  # (C,) or None, as are all parameters
    bias_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    statistics_ptr,  # (2 or 4, N, G)
    partials_ptr,  # of gradient_sums_kernel, as are the coefficients
    coefficients_ptr,
    dparameters_ptr,  # (2 or 4, C): dγ and dβ of x, then of the residual
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
    RELU: tl.constexpr,
):
    """Write the gradients of x, and of a normalized residual, for one split of the pixels.

    Each program merges the sums of its groups; the first of each tile those of its channels as
    well, which are the gradients of the parameters.
    """
    num_channels, num_pixels = marked_sizes(num_channels, num_pixels, VECTOR, CHANNELS_LAST)
    sample, split, tile = program_position(num_tiles, num_splits)
    channel, group, valid = tile_channels(
        tile, num_channels, CHANNELS_PER_GROUP, SEGMENTS, LANES, PARTS
    )
    if (sample == 0) & (split == 0):
        num_rows = num_samples * num_splits
        partials_stride = num_rows * num_channels
        dweight = sum_rows(partials_ptr, channel, valid, num_rows, num_channels, SUMMED_ROWS)
        tl.store(dparameters_ptr + channel, dweight, valid)
        dbias = sum_rows(
            partials_ptr + partials_stride, channel, valid, num_rows, num_channels, SUMMED_ROWS
        )
        tl.store(dparameters_ptr + num_channels + channel, dbias, valid)
        if residual_ptr is not None:
            dweight = sum_rows(
                partials_ptr + 2 * partials_stride, channel, valid, num_rows, num_channels,
                SUMMED_ROWS,
            )  # fmt: skip
            tl.store(dparameters_ptr + 2 * num_channels + channel, dweight, valid)
            tl.store(dparameters_ptr + 3 * num_channels + channel, dbias, valid)

    base = sample.to(tl.int64) * num_channels * num_pixels
    statistics = statistics_ptr + sample * num_groups
    stride = num_samples * num_groups
    segment_group, segment_valid = tile_groups(tile, num_groups, SEGMENTS, PARTS)
    entries = num_splits * PARTS
    coefficients = coefficients_ptr + sample * num_groups * entries
    inverse_size = 1.0 / (CHANNELS_PER_GROUP * num_pixels.to(tl.float32))
    mean = load_per_group(statistics, tile, group, valid, SEGMENTS, PARTS)
    rstd = load_per_group(statistics + stride, tile, group, valid, SEGMENTS, PARTS)
    c1, c2 = merge_coefficients(
        coefficients, stride * entries, segment_group, segment_valid, entries, inverse_size,
        SEGMENTS, LANES, MAX_ENTRIES,
    )  # fmt: skip
    scale = rstd * load_parameter(weight_ptr, channel, valid, 1.0)
    if RELU:
        bias = load_parameter(bias_ptr, channel, valid, 0.0)
    if residual_ptr is not None:
        statistics += 2 * stride
        residual_mean = load_per_group(statistics, tile, group, valid, SEGMENTS, PARTS)
        residual_rstd = load_per_group(statistics + stride, tile, group, valid, SEGMENTS, PARTS)
        residual_c1, residual_c2 = merge_coefficients(
            coefficients + 2 * stride * entries, stride * entries, segment_group, segment_valid,
            entries, inverse_size, SEGMENTS, LANES, MAX_ENTRIES,
        )  # fmt: skip
        residual_scale = residual_rstd * load_parameter(residual_weight_ptr, channel, valid, 1.0)
        if RELU:
            bias += load_parameter(residual_bias_ptr, channel, valid, 0.0)

    first = split * split_blocks * BLOCK_PIXELS
    num_blocks = tl.cdiv(tl.minimum(split_blocks * BLOCK_PIXELS, num_pixels - first), BLOCK_PIXELS)
    for block in tl.range(num_blocks, loop_unroll_factor=2):
        # Backwards, as in apply_kernel: the last pixels of gradient_sums_kernel are in the cache.
        pixel = first + (num_blocks - 1 - block) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        mask = valid[:, None] & (pixel < num_pixels)[None, :]
        offsets = tile_offsets(
            channel, pixel, num_channels.to(tl.int64), num_pixels.to(tl.int64), CHANNELS_LAST
        )
        x = tl.load(x_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + base + offsets, mask, other=0.0).to(tl.float32)
        centered = x - mean[:, None]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + base + offsets, mask, other=0.0).to(tl.float32)
            residual_centered = residual - residual_mean[:, None]
        if RELU:
            shift = bias[:, None]
            if residual_ptr is not None:
                shift = normalize(residual_centered, residual_scale, shift)
            dz = where_positive(dz, normalize(centered, scale, shift), dy_ptr.dtype.element_ty)
        dx = input_gradient(dz, centered, scale, rstd, c1, c2)
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
        if residual_ptr is not None:
            dx = input_gradient(
                dz, residual_centered, residual_scale, residual_rstd, residual_c1, residual_c2
            )
            tl.store(dresidual_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
