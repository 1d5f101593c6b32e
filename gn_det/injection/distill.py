"""Distillation: a converted network learns to give the features of the network with BN."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.amp import amp_dtype
from gn_det.budget import check_archive
from gn_det.errors import InputError
from gn_det.files import check_regular_file, make_folder, whole_file
from gn_det.injection.eval_mode import eval_mode
from gn_det.injection.features import Call, level_errors, level_loss, levels_of
from gn_det.injection.report import Report
from gn_det.text import reason_of, shortened, table

__all__ = ["Distillation", "distill"]

_SAVES, _LOGS = 20, 10  # in all


@dataclass(frozen=True)
class Distillation(Report):
    """What :func:`gn_det.distill` did; str() is the table of levels.

    Errors are ‖student − teacher‖ / ‖teacher − mean(teacher)‖ over the held-out batches, the mean
    being that of each channel: 1 is no better than a constant in each channel.

    Attributes:
        before, after: error of each level by its name.
        losses: of each step: the squared relative error, a mean over channels and levels.
    """

    before: dict[str, float]
    after: dict[str, float]
    losses: tuple[float, ...]

    def _tables(self, style: str) -> str:
        rows = [[name, error, self.after[name]] for name, error in self.before.items()]
        headers = ["level", "before", "distilled"]
        return table(rows, headers, tablefmt=style, floatfmt=".3f")


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 400,
    lr: float = 1e-3,
    call: Call = lambda model, batch: model(batch),
    held_out: Sequence[Any] = (),
    checkpoint: str | Path | None = None,
) -> Distillation:
    """Train a converted network to give the features of the network with BN that it was.

    ``convert_bn`` fits γ and β; what it cannot change is that GN takes other statistics than BN.
    Here all parameters of the student learn, on pictures without labels, to give the teacher's
    feature maps. The loss is the squared error of each channel, relative to the variance of the
    teacher's channel, a mean over channels and levels. AdamW's learning rate rises over a
    twentieth of the steps and falls to 0 as a cosine. On a GPU, both networks run in mixed
    precision.

    Both networks run in eval mode. Modes, and which parameters train, are afterwards as before.

    Args:
        student: the converted network. It is modified in place; after an error it is unchanged.
        teacher: the network with BN, with feature maps of the same shapes. It is not changed.
        batches: what ``call`` takes: a sequence, of which step i takes batch i modulo its length,
            or another iterable that is gone through again and again.
        steps: batches to learn from, default 400.
        lr: the highest learning rate, default 1e-3.
        call: ``call(model, batch)`` returns the feature maps of one batch: a tensor, several, or a
            dict of tensors, each (N, C, *spatial). Default: ``model(batch)``.
        held_out: batches for the errors of the result; default: the first 4 of batches.
        checkpoint: file for the state of the distillation, written 20 times on the way. Where it
            exists, the distillation goes on from it, with the same result as without the break,
            if the batches are the same.

    Returns:
        Distillation: the error of each level before and after, and the loss of each step.

    Raises:
        InputError: steps is below 1 or lr not above 0, student and teacher are one, share tensors,
            give the same features or are swapped, the batches are none or end, the teacher fails on
            one or its features are not finite, feature maps differ in number, names or shapes or
            have one value for each channel, the loss is not finite, or the checkpoint is of other
            networks, steps or lr, or of another call or other held-out batches.

    Example::

        import copy
        from torchvision.models import resnet18

        student = resnet18()  # in practice with your trained weights
        teacher = copy.deepcopy(student)
        batches = [torch.rand(2, 3, 64, 64) for _ in range(2)]
        gn_det.convert_bn(student, batches)
        print(gn_det.distill(student, teacher, batches, steps=3))
    """
    are_numbers = isinstance(steps, Integral) and isinstance(lr, Real)
    if not are_numbers or steps < 1 or not 0 < lr < math.inf:
        raise InputError(f"steps {steps!r} and lr {lr!r}: at least 1 step, and an lr above 0")
    steps, lr = int(steps), float(lr)  # a checkpoint with NumPy's could not be read
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise InputError(
            f"distillation goes through the batches again and again, and a "
            f"{type(batches).__name__} cannot be read so; give a list"
        )
    if student is teacher:
        raise InputError("the student is the teacher; give a copy of the network with BN")
    if shared := _shared(student, teacher):
        raise InputError(
            f"student and teacher share {len(shared)} parameters or buffers "
            f"({shortened(shared, 3)}), and the teacher would change; copy.deepcopy the "
            "network with BN before convert_bn"
        )
    if _has_bn(student) and not _has_bn(teacher):
        raise InputError("the student has BN, and the teacher has none; give them the other way")
    held_out = [*held_out] or [*islice(_endless(batches, 0), 4)]
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        make_folder(file.parent)
    start = copy.deepcopy(student.state_dict())
    with _for_distillation(student, teacher):
        try:
            before, losses = _learn(student, teacher, batches, steps, lr, call, held_out, file)
            after = level_errors(student, teacher, held_out, call)
        except BaseException:
            student.load_state_dict(start)
            raise
    worse = [name for name, error in after.items() if error > before[name]]
    if worse:
        grown = shortened((f"{n} {before[n]:.2f} to {after[n]:.2f}" for n in worse), 3)
        logging.getLogger(__name__).warning(
            f"distillation: the errors of {len(worse)} of {len(after)} levels have grown "
            f"({grown}): more steps or a lower learning rate may help; the network before it "
            "was nearer to BN there"
        )
    return Distillation(before, after, tuple(losses))


def _learn(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    steps: int,
    lr: float,
    call: Call,
    held_out: Sequence[Any],
    file: Path | None,
) -> tuple[dict[str, float], list[float]]:
    """Errors before the first step, and the loss of each."""
    parameters = [*student.parameters()]
    device = parameters[0].device.type
    dtype = amp_dtype(device == "cuda")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    parts: dict[str, Any] = {"student": student, "optimizer": optimizer, "scaler": scaler}
    settings: dict[str, Any] = {"steps": steps, "lr": lr}
    if file is not None:
        settings["networks"] = _digest(student, teacher)
    losses: list[float] = []
    before = level_errors(student, teacher, held_out, call)
    if not any(before.values()):
        raise InputError(
            "the student gives the features of the teacher already; copy the network with BN "
            "before convert_bn converts it, and give the copy as the teacher"
        )
    if file is not None and file.exists():
        losses = _resume(file, parts, settings, before)
    log, began, first = logging.getLogger(__name__), time.perf_counter(), len(losses)
    for step, batch in zip(range(first, steps), _endless(batches, first), strict=False):
        optimizer.param_groups[0]["lr"] = lr * _schedule(step, steps)
        with eval_mode(student):  # what it keeps for eval mode changes with each step
            with torch.autocast(device, dtype, enabled=dtype is not None):
                levels = levels_of(student, teacher, batch, call)
            _check_gradients({name: ours for name, (ours, _) in levels.items()})
            loss = torch.stack([level_loss(*both) for both in levels.values()]).mean()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                if not all(theirs.isfinite().all() for _, theirs in levels.values()):
                    advice = "the teacher's features are not finite: is the batch?"
                else:
                    advice = f"take a learning rate below {lr:g}"
                raise InputError(f"distillation, step {step}: the loss is {losses[-1]}; {advice}")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        done = step + 1
        if done % max(1, steps // _LOGS) == 0 or done == steps:
            seconds = (time.perf_counter() - began) / (done - first)
            recent = losses[-max(1, steps // _LOGS) :]
            log.info(
                f"distillation: step {done} of {steps}, loss {sum(recent) / len(recent):.4f}, "
                f"{seconds * (steps - done):.0f} s to go"
            )
        if file is not None and (done % max(1, steps // _SAVES) == 0 or done == steps):
            state = {name: part.state_dict() for name, part in parts.items()}
            with whole_file(file) as stream:
                torch.save({**state, **settings, "before": before, "losses": losses}, stream)
    return before, losses


def _check_gradients(features: Mapping[str, Tensor]) -> None:
    without = [name for name, feature in features.items() if not feature.requires_grad]
    if without:
        raise InputError(
            f"call gives {shortened(without, 3)} without a gradient (torch.no_grad, detach, or "
            "whole numbers), from which the student cannot learn; give feature maps as the network "
            "computes them"
        )


def _resume(
    file: Path, parts: Mapping[str, Any], settings: Mapping[str, float], before: Mapping[str, float]
) -> list[float]:
    check_regular_file(file, "checkpoint of a distillation")
    check_archive(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        found, began = {key: state[key] for key in settings}, dict(state["before"])
        states, losses = {name: dict(state[name]) for name in parts}, list(state["losses"])
        as_before = began.keys() == before.keys() and all(
            math.isclose(began[name], error, rel_tol=0.01, abs_tol=1e-4)  # of another machine
            for name, error in before.items()
        )
    except (MemoryError, OSError, torch.OutOfMemoryError):  # which say nothing of the file
        raise
    except Exception as error:  # whatever torch.load raises of what is no archive
        raise InputError(
            f"{file} is no checkpoint of a distillation ({reason_of(error)}); remove it"
        ) from error
    if found != settings:
        raise InputError(
            f"{file} is of a distillation with {found}, and this one has {settings}; take the "
            "same, or another file"
        )
    if not as_before:
        raise InputError(
            f"{file} is of a distillation that began with the errors {_shown(began)}, and this one "
            f"begins with {_shown(before)}: take the same student, call and held-out batches, or "
            "another file"
        )
    for name, part in parts.items():
        try:
            part.load_state_dict(states[name])
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{file} does not fit the {name} of this distillation ({reason_of(error)}); take "
                "the same student, or another file"
            ) from error
    return losses


def _shown(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.3f}" for name, error in errors.items())


def _shared(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of what is in both networks."""
    theirs = {*teacher.parameters(), *teacher.buffers()}
    ours = (*student.named_parameters(), *student.named_buffers())
    return [name for name, tensor in ours if tensor in theirs]


def _has_bn(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())


def _digest(student: nn.Module, teacher: nn.Module) -> str:
    """Of what the student is made of, and of the weights of the teacher."""
    # Without the addresses of functions that a module may show.
    found = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(student)).encode())
    for name, tensor in teacher.state_dict().items():
        values = tensor.detach().cpu().flatten().contiguous()
        found.update(name.encode() + values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _endless(batches: Iterable[Any], first: int) -> Iterator[Any]:
    """Batch after batch from number first on, beginning anew where they end."""
    if isinstance(batches, Sequence):
        if not len(batches):
            raise InputError("there are no batches to distill on")
        yield from (batches[number % len(batches)] for number in count(first))
    while True:
        seen = 0
        for batch in batches:
            seen += 1
            if first > 0:
                first -= 1
            else:
                yield batch
        if not seen:
            raise InputError("there are no batches to distill on")


@contextmanager
def _for_distillation(student: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Eval mode, in which every parameter of the student trains."""
    trains = {parameter: parameter.requires_grad for parameter in student.parameters()}
    with torch.inference_mode(False), eval_mode(student, teacher), torch.enable_grad():
        try:
            student.requires_grad_(True)
            yield
        finally:
            for parameter, before in trains.items():
                parameter.requires_grad = before
                parameter.grad = None
