"""How often kernels are compiled: for a handful of constants, and not for each image size."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch
from support.kernels import CHANNELS_LAST, CONTIGUOUS, LAYOUTS
from torch import Tensor

from gn_det.ops.form import Form
from gn_det.ops.kernels import backward, forward, launch
from gn_det.ops.kernels.tile import SIZES

KERNELS = [
    getattr(module, name)
    for module in (forward, backward)
    for name in module.__all__
    if name.endswith("_kernel")
]

# Channels and strides of the feature maps that an R-50-FPN normalizes.
FEATURE_MAPS = [
    (64, 2), (64, 4), (128, 4), (256, 4), (128, 8), (256, 8), (512, 8),
    (256, 16), (512, 16), (1024, 16), (256, 32), (512, 32), (2048, 32), (256, 64),
]  # fmt: skip

# Variants of all kernels together for one kind of feature map and 100 image sizes. Measured: 37 and
# 14 for the smallest maps, whose groups fit into a program, one variant for each power of two of
# pixels and each VECTOR; 17 (4 kernels × 4 VECTORs, and the reduction) and 5 for the large ones.
LIMIT = {CONTIGUOUS: 40, CHANNELS_LAST: 16}

# The same for all feature maps together. Measured: 146 and 44.
LIMIT_OF_ALL = {CONTIGUOUS: 160, CHANNELS_LAST: 50}


def image_sizes() -> list[tuple[int, int]]:
    """80 sizes as padded for an FPN, multiples of 32, and 20 odd ones."""
    chosen = random.Random(0)
    padded = [(h, w) for h in range(320, 1334, 32) for w in range(320, 1334, 32)]
    odd = range(321, 1334, 2)
    return chosen.sample(padded, 80) + [(chosen.choice(odd), chosen.choice(odd)) for _ in range(20)]


def launches_for(channels: int, stride: int, size: tuple, layout: torch.memory_format) -> list:
    height, width = (-(-side // stride) for side in size)
    x = torch.empty((3, channels, height, width), dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=layout)
    weight = torch.empty(channels, device="meta")
    inputs, form = launch.Inputs(x, weight, weight), Form(relu=True)
    y, statistics, there = launch.forward_launches(inputs, 32, 1e-5, form)
    *_, back = launch.backward_launches(inputs, y, statistics, y, 32, form)
    return there + back


def variant_of(one: launch.Launch) -> tuple:
    """What Triton compiles anew for."""
    types = tuple(
        argument.dtype if isinstance(argument, Tensor) else type(argument)
        for argument in one.arguments
    )
    return one.kernel.__name__, tuple(sorted(one.constants.items())), types, one.num_threads


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_hundred_image_sizes_take_a_handful_of_variants(layout: torch.memory_format) -> None:
    variants = defaultdict(set)
    for channels, stride in FEATURE_MAPS:
        for size in image_sizes():
            variants[channels, stride] |= {
                variant_of(one) for one in launches_for(channels, stride, size, layout)
            }
    counts = {feature_map: len(found) for feature_map, found in variants.items()}
    total = len(set.union(*variants.values()))
    print(f"{layout}: {total} variants in all, {counts}")
    assert max(counts.values()) <= LIMIT[layout], counts
    assert total <= LIMIT_OF_ALL[layout]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("channels", "stride"), [m for m in FEATURE_MAPS if m[1] <= 8], ids=str)
def test_large_maps_of_padded_images_take_one_variant_of_each_kernel(
    channels: int, stride: int, layout: torch.memory_format
) -> None:
    padded = [size for size in image_sizes() if size[0] % 32 == 0]
    variants = {
        variant_of(one)
        for size in padded
        for one in launches_for(channels, stride, size, layout)
    }  # fmt: skip
    assert len(variants) == len({name for name, *_ in variants}) == 4


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_are_not_specialised_for_sizes(kernel) -> None:
    constants = {
        name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)
    }
    numbers = {
        name for name in kernel.arg_names if not name.endswith("_ptr") and name not in constants
    }
    assert numbers - {"eps"} <= set(SIZES)  # floats are never specialised
    # The interpreter keeps what the compiler would have been told.
    told = kernel.do_not_specialize if hasattr(kernel, "params") else kernel.kwargs
    assert list(told if isinstance(told, list) else told["do_not_specialize"]) == SIZES


def test_every_number_that_a_launch_passes_is_a_size() -> None:
    seen = set()
    for size in [(96, 96), (800, 1333)]:
        for one in launches_for(256, 8, size, CONTIGUOUS):
            seen.add(one.kernel.__name__)
            named = zip(one.kernel.arg_names, one.arguments, strict=False)
            integers = {name for name, argument in named if isinstance(argument, int)}
            assert integers and integers <= set(SIZES)
    assert seen == {kernel.__name__ for kernel in KERNELS}
