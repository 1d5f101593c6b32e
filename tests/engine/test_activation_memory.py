"""What a forward pass keeps for its backward pass, on real and on fake tensors."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gn_det.engine.activation_memory import ELSEWHERE, WEIGHT_COPIES, kept_for_backward

FLOAT = 4  # bytes


def test_a_layer_keeps_its_input_where_the_pass_made_it_and_never_its_weight() -> None:
    layer, x = nn.Linear(8, 100), torch.ones(4, 8)
    assert kept_for_backward(lambda: layer(x).mean()) == {}
    assert kept_for_backward(lambda: layer(x + 1).mean()) == {ELSEWHERE: 4 * 8 * FLOAT}


def test_a_storage_that_two_layers_keep_counts_once_and_as_a_whole() -> None:
    one, two, x = nn.Linear(8, 2), nn.Linear(4, 2), torch.ones(4, 8)

    def forward() -> Tensor:
        made = x + 1
        return one(made).mean() + two(made[:, :4]).mean()

    assert kept_for_backward(forward) == {ELSEWHERE: 4 * 8 * FLOAT}


def test_what_gives_no_gradient_keeps_nothing() -> None:
    layer = nn.Linear(8, 100).requires_grad_(False)
    assert kept_for_backward(lambda: {"loss": layer(torch.ones(4, 8))}) == {}


def test_what_outlives_the_graph_does_not_count() -> None:
    cache, weight = [], torch.ones(8, requires_grad=True)

    def forward() -> Tensor:
        cache.append(torch.ones(1000))
        return 3 * weight

    assert kept_for_backward(forward) == {}
    # An exponential keeps its result: that is the graph's, too.
    assert kept_for_backward(lambda: weight.exp()) == {ELSEWHERE: 8 * FLOAT}


def test_what_selective_checkpointing_stores_counts() -> None:
    keep_products = functools.partial(
        create_selective_checkpoint_contexts,
        lambda ctx, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE
            if op is torch.ops.aten.mm.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        ),
    )
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(16, 8)

    def layers(x: Tensor) -> Tensor:
        return (x @ weight).sin().cos().exp()

    kept = kept_for_backward(
        lambda: checkpoint(layers, x, use_reentrant=False, context_fn=keep_products).mean()
    )
    assert kept == {ELSEWHERE: 16 * 8 * FLOAT}
    assert kept_for_backward(lambda: layers(x).mean()) == {ELSEWHERE: 3 * 16 * 8 * FLOAT}


def test_storages_belong_to_the_innermost_part_that_ran() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    model = nn.Sequential(nn.Sigmoid(), inner, nn.Sigmoid())
    x = torch.ones(4, 8, requires_grad=True)
    kept = kept_for_backward(lambda: model(x).mean(), {"model": model, "inner": inner})
    assert kept == {"model": 2 * 4 * 8 * FLOAT, "inner": 4 * 8 * FLOAT}
    assert not model._forward_hooks and not inner._forward_pre_hooks


def test_a_pass_that_fails_leaves_no_hooks() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(RuntimeError):
        kept_for_backward(lambda: model(torch.ones(4, 7)), {"model": model})
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_fake_tensors_count_as_real_ones() -> None:
    def kept() -> dict[str, int]:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        x = torch.ones(2, 3, 10, 10)
        return kept_for_backward(lambda: model(x).mean(), {"model": model})

    with FakeTensorMode(), torch.device("cuda"):
        fake = kept()
    # ReLU's result, which the pooling keeps too, and its indices; the mean keeps nothing.
    assert fake == kept() == {"model": 2 * 8 * 8 * 8 * FLOAT + 2 * 8 * 4 * 4 * 8}


def test_copies_of_weights_under_autocast_are_told_apart(
    cuda: torch.device, autocast: None
) -> None:
    with cuda:
        model, x = nn.Conv2d(4, 8, 1), torch.empty(2, 4, 5, 5, requires_grad=True)
    kept = kept_for_backward(lambda: F.relu(model(x)).mean(), {"conv": model}, model.parameters())
    # The convolution keeps x in bfloat16, ReLU its result, which belongs to no part.
    assert kept == {
        WEIGHT_COPIES: 2 * 4 * 8,
        "conv": 2 * 2 * 4 * 25,
        ELSEWHERE: 2 * 2 * 8 * 25,
    }
