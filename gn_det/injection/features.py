"""Feature maps of two networks, and how far they are apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.injection.batches import running_on
from gn_det.injection.eval_mode import eval_mode

__all__ = ["Call", "Features", "level_errors", "level_loss", "levels_of"]

Features = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Call = Callable[[nn.Module, Any], Features]

# Of a level's mean variance: channels that vary less count as if they varied so much.
_LEAST_VARIANCE = 0.1


def levels_of(
    student: nn.Module, teacher: nn.Module, batch: Any, call: Call
) -> dict[str, tuple[Tensor, Tensor]]:
    """The feature maps of two networks on a batch, the teacher's without gradients, by name.

    Args:
        student, teacher: networks that give the same feature maps.
        batch: of both.
        call: runs a network on a batch, and returns its feature maps.

    Raises:
        InputError: the teacher fails on the batch, the features are no tensors, differ in number,
            names or shapes, or have one value for each channel.
    """
    with torch.no_grad(), running_on(batch):
        theirs = _named(call(teacher, batch))
    ours = _named(call(student, batch))
    shapes = [{name: tuple(y.shape) for name, y in each.items()} for each in (ours, theirs)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise InputError(
            f"the student gives feature maps {shapes[0]}, and the teacher {shapes[1]}; they have "
            "to be the same"
        )
    for name, y in theirs.items():
        if y.dim() < 2 or y.numel() == y.shape[1]:
            raise InputError(
                f"{name} of a batch is a {tuple(y.shape)} tensor, and has one value for each "
                "channel, which says nothing of how it varies; give feature maps, or larger batches"
            )
    return {name: (y, theirs[name]) for name, y in ours.items()}


@torch.no_grad()
def level_errors(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Any], call: Call
) -> dict[str, float]:
    """The relative error of each level, in eval mode.

    Args:
        student, teacher: networks that give the same feature maps.
        batches: of both, each run once.
        call: runs a network on a batch, and returns its feature maps.

    Returns:
        By name of the level, ‖student − teacher‖ / ‖teacher − mean(teacher)‖ over the batches, the
        mean being that of each channel.

    Raises:
        InputError: as :func:`levels_of`, or the teacher's features are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    with eval_mode(student, teacher):
        for batch in batches:
            for name, (ours, theirs) in levels_of(student, teacher, batch, call).items():
                ours, theirs = (_by_channel(y).double() for y in (ours, theirs))
                found = torch.stack(
                    [(ours - theirs).square().sum(1), theirs.sum(1), theirs.square().sum(1)]
                )
                sums[name] = sums.get(name, 0) + found
                counts[name] += theirs.shape[1]
    errors = {}
    for name, (squares, total, total_squares) in sums.items():
        spread = (total_squares - total.square() / counts[name]).sum().item()
        error = squares.sum().item()
        if not math.isfinite(spread):
            raise InputError(
                f"the teacher's {name} is not finite on the held-out batches: are these?"
            )
        errors[name] = math.sqrt(error / spread) if spread > 0 else math.inf if error else 0.0
    return errors


def level_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """The squared error relative to the variance of the teacher's channel, a mean over channels.

    Args:
        ours, theirs: (N, C, *spatial) of the student and of the teacher.
    """
    ours, theirs = _by_channel(ours).float(), _by_channel(theirs).float()
    variance = theirs.var(1, unbiased=False)
    least = _LEAST_VARIANCE * variance.mean() + torch.finfo(torch.float32).tiny
    return ((ours - theirs).square().mean(1) / variance.clamp(min=least)).mean()


def _by_channel(feature: Tensor) -> Tensor:
    """(N, C, *spatial) as (C, N * spatial)."""
    return feature.transpose(0, 1).flatten(1)


def _named(features: Features) -> dict[str, Tensor]:
    if isinstance(features, Tensor):
        return {"output": features}
    named = features if isinstance(features, Mapping) else dict(enumerate(features))
    for name, feature in named.items():
        if not isinstance(feature, Tensor):
            raise InputError(
                f"call gives a {type(feature).__name__} as {name}, and distillation takes feature "
                "maps: give a call that returns them, as of the backbone of a detector"
            )
    return {str(name): feature for name, feature in named.items()}
