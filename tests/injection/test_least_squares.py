"""The closed form of a channel's γ, β against PyTorch's least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from gn_det.injection import least_squares
from gn_det.injection.least_squares import ChannelFit, sums_of, sums_of_gn


def data(seed: int, batches: int, channels: int, noise: float) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slope, offset = draw(2, channels, 1, 1)
    pairs = []
    for n in range(1, batches + 1):
        x = draw(n, channels, 3, 4)
        pairs.append((x, slope * x + offset + noise * draw(*x.shape)))
    return pairs


def fitted(pairs: list[tuple[Tensor, Tensor]]) -> ChannelFit:
    return ChannelFit(sum(sums_of(x, y) for x, y in pairs))


def by_channel(pairs: list[tuple[Tensor, Tensor]], which: int) -> Tensor:
    return torch.cat([pair[which].movedim(1, 0).flatten(1) for pair in pairs], dim=1)


cases = given(
    seed=st.integers(0, 2**20),
    batches=st.integers(1, 3),
    channels=st.integers(1, 5),
    noise=st.sampled_from([0.0, 0.1, 3.0]),
)


@settings(max_examples=40, deadline=None)
@cases
def test_the_closed_form_is_that_of_lstsq(
    seed: int, batches: int, channels: int, noise: float
) -> None:
    pairs = data(seed, batches, channels, noise)
    weight, bias = fitted(pairs).solve(torch.ones(channels))
    xs, ys = by_channel(pairs, 0), by_channel(pairs, 1)
    for c in range(channels):
        columns = torch.stack([xs[c], torch.ones_like(xs[c])], dim=1)
        expected = torch.linalg.lstsq(columns, ys[c, :, None]).solution[:, 0]
        assert_close(torch.stack([weight[c], bias[c]]), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@cases
def test_no_other_weight_and_bias_have_a_smaller_error(
    seed: int, batches: int, channels: int, noise: float
) -> None:
    fit = fitted(data(seed, batches, channels, noise))
    weight, bias = fit.solve(torch.ones(channels))
    least = fit.relative_error(weight, bias)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.1, 10.0):
        other = [p + size * torch.randn(channels, generator=generator) for p in (weight, bias)]
        assert fit.relative_error(*other) >= least


def test_the_error_is_the_distance_over_the_spread_around_the_mean_of_each_channel() -> None:
    pairs = data(0, 3, 4, 1.0)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    xs, ys = by_channel(pairs, 0), by_channel(pairs, 1)
    distance = (weight[:, None] * xs + bias[:, None] - ys).norm()
    spread = (ys - ys.mean(1, keepdim=True)).norm()
    error = fitted(pairs).relative_error(weight, bias)
    assert error == pytest.approx((distance / spread).item(), rel=1e-9)


@pytest.mark.parametrize("at_a_time", [1, 100, 10_000])
def test_inputs_of_gn_are_taken_in_by_parts(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_VALUES_AT_A_TIME", at_a_time)
    x, y = torch.randn(2, 5, 4, 3, 3)
    parts = sums_of_gn(x, 2, 1e-3, y)
    whole = sums_of(torch.nn.functional.group_norm(x.double(), 2, eps=1e-3), y)
    assert_close(parts, whole)
    assert ChannelFit(parts).count == 5 * 9


def test_a_mean_in_each_channel_has_the_error_one() -> None:
    pairs = data(0, 2, 3, 1.0)
    mean = by_channel(pairs, 1).mean(1)
    assert fitted(pairs).relative_error(torch.zeros(3), mean) == pytest.approx(1.0, rel=1e-6)


def test_a_constant_input_keeps_the_weight_and_gives_the_mean() -> None:
    x = torch.full((2, 2, 3, 3), 0.7)
    x[:, 1] = torch.randn(2, 3, 3)
    y = torch.randn(2, 2, 3, 3)
    fit = fitted([(x, y)])
    assert fit.constant.tolist() == [True, False]
    weight, bias = fit.solve(torch.tensor([5.0, 5.0]))
    assert weight[0] == 5.0
    assert (weight * 0.7 + bias)[0].item() == pytest.approx(y[:, 0].mean().item(), abs=1e-6)


def test_outputs_that_do_not_vary_have_no_relative_error() -> None:
    fit = fitted([(torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), 1000.3))])
    assert fit.relative_error(torch.zeros(3), torch.zeros(3)) is None
    weight, bias = fit.solve(torch.ones(3))
    assert_close(weight, torch.zeros(3).double(), atol=1e-9, rtol=0)
    assert_close(bias, torch.full((3,), 1000.3).double(), atol=1e-3, rtol=0)
