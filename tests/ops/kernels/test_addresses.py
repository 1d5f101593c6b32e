"""Addresses, in Triton's interpreter: each element written once, none outside, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.kernels import CHANNELS_LAST, INTERPRETED, LAYOUTS, make_inputs, run_kernels
from support.tables import every_pair
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gn_det.ops import plan
from gn_det.ops.form import FORMS, Form
from gn_det.ops.kernels import launch
from gn_det.ops.kernels.backward import reduce_gradients_kernel
from gn_det.ops.kernels.forward import statistics_kernel

# Only the interpreter shows its addresses.
__test__ = INTERPRETED

# Lanes and pixels of a tile are partly empty in all but the third, where a channels_last tile has
# fewer groups than it could hold.
CUTS = {
    "one_pass": ((5, 9, 3, 5), 3),
    "split": ((2, 6, 25, 41), 2),
    "groups": ((1, 6, 31, 37), 3),
    "parts": ((1, 35, 9, 29), 1),
}

# More than 2³¹ elements: by the number of samples, and within one sample.
HUGE = {
    "one_pass": ((2**20 + 3, 64, 7, 7), 16),
    "split": ((8000, 64, 66, 67), 16),
    "one_sample": ((1, 2**21, 31, 34), 2**17),
}


class Accesses(NamedTuple):
    """The addresses that programs loaded from and stored to, one array for each operation."""

    loads: list[np.ndarray]
    stores: list[np.ndarray]


def elements_of(tensor: Tensor, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which addresses lie in a tensor, and the elements that those are."""
    offsets = addresses - tensor.data_ptr()
    inside = (offsets >= 0) & (offsets < tensor.numel() * tensor.element_size())
    elements, rest = np.divmod(offsets[inside], tensor.element_size())
    assert not rest.any()
    return inside, elements


class Interpreter:
    """Triton's interpreter, observed and steered.

    Attributes:
        accesses: what was loaded and stored.
        tensors: an access outside of these fails before it happens.
        dry: leave memory alone; what is loaded is 0.
        order: the program to run in place of program 0, 1, ...; None for those.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.accesses = Accesses([], [])
        self.tensors: list[Tensor] = []
        self.dry = False
        self.order: np.ndarray | None = None
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def observed(mask: TensorHandle, ptrs: TensorHandle, log: list) -> TensorHandle:
            addresses = ptrs.data[mask.data.astype(bool)].astype(np.int64)
            log.append(addresses)
            if self.tensors:
                inside = [elements_of(tensor, addresses)[0] for tensor in self.tensors]
                assert np.any(inside, axis=0).all(), "an address outside of all tensors"
            return TensorHandle(np.zeros_like(mask.data), mask.dtype) if self.dry else mask

        def observed_load(builder: Any, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            mask = observed(mask, ptrs, self.accesses.loads)
            return load(builder, ptrs, mask, *args, **kwargs)

        def observed_store(
            builder: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            mask = observed(mask, ptrs, self.accesses.stores)
            return store(builder, ptrs, value, mask, *args, **kwargs)

        def set_grid_idx(builder: Any, x: int, y: int, z: int) -> None:
            builder.grid_idx = (x if self.order is None else int(self.order[x]), y, z)

        def atomic(*args: Any) -> None:
            raise AssertionError("an atomic operation")

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", observed_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", observed_store)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", atomic)
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_cas", atomic)

    def run(self, one: launch.Launch, device: torch.device) -> Accesses:
        self.accesses.loads.clear()
        self.accesses.stores.clear()
        self.tensors = [] if self.dry else [t for t in one.arguments if isinstance(t, Tensor)]
        launch.run([one], device)
        return Accesses(*map(list, self.accesses))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    return Interpreter(monkeypatch)


def launches_of(
    form: Form, num_groups: int, inputs: dict[str, Tensor]
) -> tuple[list[launch.Launch], list[launch.Launch], dict[str, Tensor]]:
    """The launches forward and backward, and what the backward takes besides the inputs."""
    taken = launch.Inputs(**inputs)
    y, statistics, forward = launch.forward_launches(taken, num_groups, 1e-5, form)
    dy = torch.ones_like(taken.x)
    *_, backward = launch.backward_launches(taken, y, statistics, dy, num_groups, form)
    return forward, backward, {"dy": dy, "y": y, "statistics": statistics}


def count(addresses: list[np.ndarray], tensors: Iterable[Tensor]) -> dict[int, np.ndarray]:
    """How often each element of each tensor is addressed, by the tensors' own addresses."""
    everything = np.concatenate(addresses)
    return {
        t.data_ptr(): np.bincount(elements_of(t, everything)[1], minlength=t.numel())
        for t in tensors
    }


@pytest.mark.parametrize(
    ("form", "cut", "layout"),
    every_pair(["GN+ReLU", "GN+add+ReLU", "GN+GN+add+ReLU"], CUTS, LAYOUTS),
)
def test_every_element_is_written_once_before_it_is_read(
    form: str,
    cut: tuple,
    layout: torch.memory_format,
    interpreter: Interpreter,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In one pass, programs of a contiguous tensor take two of the five samples in turn.
    monkeypatch.setattr(plan, "GRADIENT_THREADS", 2 * 3 * 64)
    shape, num_groups = cut
    inputs = make_inputs(FORMS[form], shape, device, layout=layout)
    forward, backward, passed_on = launches_of(FORMS[form], num_groups, inputs)
    given = {tensor.data_ptr() for tensor in (*inputs.values(), passed_on["dy"])}
    tensors: dict[int, Tensor] = {}
    written: dict[int, np.ndarray] = {}
    for one in (*forward, *backward):
        here = {t.data_ptr(): t for t in one.arguments if isinstance(t, Tensor)}
        for address, tensor in here.items():
            tensors.setdefault(address, tensor)
            written.setdefault(address, np.zeros(tensor.numel(), dtype=np.int64))
        loads, stores = interpreter.run(one, device)
        stored = count(stores, here.values())
        loaded = count(loads, here.values())
        for address in here:
            name = f"of a tensor {tuple(here[address].shape)} in {one.kernel.__name__}"
            # Programs that neither share what they write nor read it can run in any order.
            assert not (stored[address].any() and loaded[address].any()), f"read and write {name}"
            if address not in given:
                assert written[address][loaded[address] > 0].all(), f"unwritten elements {name}"
            written[address] += stored[address]
    for address, times in written.items():
        once = 0 if address in given else 1
        assert (times == once).all(), f"{tuple(tensors[address].shape)}: {np.unique(times)} times"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cut", [CUTS["one_pass"], CUTS["split"]], ids=["one_pass", "split"])
def test_the_order_of_programs_does_not_change_a_bit(
    cut: tuple,
    layout: torch.memory_format,
    interpreter: Interpreter,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    shape, num_groups = cut
    inputs = make_inputs(form, shape, device, layout=layout)
    dy = torch.randn(shape, device=device)
    y, gradients = run_kernels(form, num_groups, inputs, dy)

    run, orders = launch.run, []

    def run_shuffled(launches: Iterable[launch.Launch], device: torch.device) -> None:
        for one in launches:
            interpreter.order = np.random.default_rng(0).permutation(one.num_programs)
            orders.append(interpreter.order)
            run([one], device)

    monkeypatch.setattr(launch, "run", run_shuffled)
    shuffled_y, shuffled = run_kernels(form, num_groups, inputs, dy)
    assert sum((np.diff(order) != 1).any() for order in orders) >= 2
    assert torch.equal(shuffled_y, y)
    assert all(torch.equal(shuffled[name], gradients[name]) for name in gradients)


def tile_of(cut: plan.Plan, program: int) -> np.ndarray:
    """The offsets of the elements that a program has, by the words of the plan."""
    tile, rest = program % cut.num_tiles, program // cut.num_tiles
    split, sample = rest % cut.num_splits, rest // cut.num_splits
    channels = []
    for segment in range(tile * cut.segments, (tile + 1) * cut.segments):
        group, part = divmod(segment, cut.parts)
        of_part = range(part * cut.lanes, min((part + 1) * cut.lanes, cut.channels_per_group))
        channels += [group * cut.channels_per_group + c for c in of_part if group < cut.num_groups]
    of_split = cut.split_blocks * cut.block_pixels
    pixels = np.arange(split * of_split, min((split + 1) * of_split, cut.num_pixels))[None]
    channels = np.array(channels, dtype=np.int64)[:, None]
    first = sample * cut.num_channels * cut.num_pixels
    if cut.channels_last:
        return (first + pixels * cut.num_channels + channels).ravel()
    return (first + channels * cut.num_pixels + pixels).ravel()


@pytest.mark.parametrize(
    ("size", "form", "layout"), every_pair(HUGE, ["GN+add+ReLU", "GN+GN+add+ReLU"], LAYOUTS)
)
def test_addresses_are_right_beyond_two_to_the_31st(
    size: tuple,
    form: str,
    layout: torch.memory_format,
    interpreter: Interpreter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One sample a program: a million of them would leave thousands to each.
    monkeypatch.setattr(plan, "GRADIENT_THREADS", 2**40)
    shape, num_groups = size
    assert torch.Size(shape).numel() > 2**31
    inputs = {
        name: torch.empty(
            tensor.shape if tensor.dim() == 1 else shape, dtype=torch.bfloat16, device="meta"
        )
        for name, tensor in make_inputs(FORMS[form], (1, *shape[1:2], 1, 1), "cpu").items()
    }
    for name in ("x", "residual"):
        inputs[name] = inputs[name].contiguous(memory_format=layout)
    forward, backward, _ = launches_of(FORMS[form], num_groups, inputs)
    interpreter.dry = True
    for one in (*forward, *backward):
        if one.kernel is reduce_gradients_kernel:
            continue
        assert_last_program_is_right(one, interpreter, launch.plan_of(
            inputs["x"], num_groups, backward=any(one is other for other in backward)
        ))  # fmt: skip


def assert_last_program_is_right(
    one: launch.Launch, interpreter: Interpreter, cut: plan.Plan
) -> None:
    """Run the last program of a launch of meta tensors, on addresses only."""
    metas = {id(t): t for t in one.arguments if isinstance(t, Tensor)}
    tensors = {key: torch.empty(1, dtype=meta.dtype) for key, meta in metas.items()}
    arguments = tuple(tensors.get(id(argument), argument) for argument in one.arguments)
    interpreter.order = np.array([one.num_programs - 1])
    loads, stores = interpreter.run(
        one._replace(arguments=arguments, num_programs=1), torch.device("cpu")
    )
    images = [key for key, meta in metas.items() if meta.numel() > 2**31]
    small = metas.keys() - set(images)
    if one.kernel is statistics_kernel:
        images = images[-1:]  # the last programs have the residual, where there is one
    addresses = np.unique(np.concatenate(loads + stores))

    tile = tile_of(cut, (one.num_programs - 1) % cut.num_programs)
    assert tile.max() == metas[images[0]].numel() - 1
    expected = np.unique(np.concatenate([tensors[i].data_ptr() + 2 * tile for i in images]))
    assert np.isin(expected, addresses).all(), f"{one.kernel.__name__} leaves elements out"
    others = np.setdiff1d(addresses, expected)
    for key in small:
        first = tensors[key].data_ptr()
        last = first + metas[key].numel() * metas[key].element_size()
        others = others[(others < first) | (others >= last)]
    assert not others.size, f"{one.kernel.__name__} goes outside"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_launches_for_huge_tensors_count_in_32_bits_what_has_32_bits(
    form: Form, layout: torch.memory_format
) -> None:
    shape = (3, 64, 6000, 7000)
    image = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=layout)
    weight = torch.empty(64, device="meta")
    inputs = {"x": image, "weight": weight, "bias": weight}
    if form.add:
        inputs["residual"] = image
    forward, backward, _ = launches_of(form, 16, inputs)
    for one in (*forward, *backward):
        assert one.num_programs < 2**31
        small = [t for t in one.arguments if isinstance(t, Tensor) and t.shape != image.shape]
        assert all(t.numel() < 2**31 for t in small)
    for direction in (False, True):
        cut = launch.plan_of(image, 16, direction)
        assert cut.channels_last == (layout == CHANNELS_LAST)
        assert cut.num_splits * cut.parts <= cut.max_entries
        covered = cut.num_splits * cut.split_blocks * cut.block_pixels
        assert 6000 * 7000 <= covered < 2**31
