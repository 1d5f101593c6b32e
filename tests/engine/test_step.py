"""A step of several batches: with GN, and not BN, the gradient of one of all their images."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.events import EventStorage
from support.processes import in_two_processes
from torch import Tensor, nn

from gn_det import FusedGroupNorm, InputError, fuse, recompute
from gn_det.engine.step import AccumulatingTrainer, largest_norms
from gn_det.engine.trainer import wrap_ddp


class MeanOverImages(nn.Module):
    """A small network whose loss is a mean over images."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        layer = FusedGroupNorm if norm == "GN" else "BN"
        self.body = nn.Sequential(BasicBlock(3, 32, stride=2, norm=layer), nn.Conv2d(32, 4, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        y = self.body(images)
        return {"loss_a": y.square().mean(), "loss_b": y.abs().mean()}


def model(norm: str) -> nn.Module:
    torch.manual_seed(0)
    net = MeanOverImages(norm).double()
    return fuse(net) if norm == "GN" else net


def images() -> Tensor:
    return torch.randn(4, 3, 10, 12, generator=torch.Generator().manual_seed(1)).double()


def gradients(
    net: nn.Module, batches: list[Tensor], accumulate_steps: int
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients and metrics of one step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(net, batches, optimizer, accumulate_steps)
    trainer.iter = 0
    with EventStorage() as storage:
        trainer.run_step()
        metrics = {name: value for name, (value, _) in storage.latest().items()}
    return [p.grad for p in net.parameters()], metrics


@pytest.mark.parametrize(("at_a_time", "batches"), [(1, 4), (2, 2)])
def test_k_batches_give_gn_the_gradient_of_one(at_a_time: int, batches: int) -> None:
    whole, loss = gradients(model("GN"), [images()], 1)
    parts, loss_of_parts = gradients(model("GN"), list(images().split(at_a_time)), batches)
    for expected, actual in zip(whole, parts, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert loss_of_parts["total_loss"] == pytest.approx(loss["total_loss"])
    assert loss_of_parts["loss_a"] == pytest.approx(loss["loss_a"])


def test_k_batches_give_bn_another_gradient() -> None:
    whole, _ = gradients(model("BN"), [images()], 1)
    parts, _ = gradients(model("BN"), list(images().split(1)), 4)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(parts, whole, strict=True))
    assert worst > 0.1


def test_a_step_is_taken_once_for_all_batches() -> None:
    net = model("GN")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *args: steps.append(args))
    trainer = AccumulatingTrainer(net, list(images().split(1)) * 2, optimizer, accumulate_steps=4)
    before = copy.deepcopy(net.state_dict())
    for trainer.iter in range(2):
        with EventStorage(trainer.iter):
            trainer.run_step()
    assert len(steps) == 2
    assert any(not torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    net = model("GN")
    before = copy.deepcopy(net.state_dict())
    batches = [images()[:1], torch.full_like(images()[:1], torch.nan)]
    with pytest.raises(InputError, match="iteration 0: the loss is not finite: loss_a nan"):
        gradients(net, batches, 2)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_float16_scales_its_losses_and_keeps_the_scale() -> None:
    net = model("GN").float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(net, [images().float()], optimizer, dtype=torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    trainer.iter = 0
    other = AccumulatingTrainer(net, [], optimizer, dtype=torch.float16)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 128.0
    # Its gradients are of the losses times the scale, until the optimizer steps.
    scaled = []
    net.body[1].weight.register_post_accumulate_grad_hook(lambda p: scaled.append(p.grad.clone()))
    with EventStorage():
        trainer.run_step()
    torch.testing.assert_close(net.body[1].weight.grad * 128, scaled[0])


def test_recomputation_changes_no_bit_of_an_accumulated_step() -> None:
    expected, _ = gradients(model("GN"), list(images().split(2)), 2)
    found, _ = gradients(recompute(model("GN")), list(images().split(2)), 2)
    assert all(map(torch.equal, found, expected))


def test_mixed_precision_computes_in_its_dtype() -> None:
    net = model("GN").float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    net.body[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer = AccumulatingTrainer(net, [images().float()], optimizer, dtype=torch.bfloat16)
    trainer.iter = 0
    with EventStorage():
        trainer.run_step()
    assert seen == [torch.bfloat16]


def save_gradients(rank: int, folder: Path) -> None:
    mine = list(images()[2 * rank : 2 * rank + 2].split(1))
    found, _ = gradients(wrap_ddp(model("GN"), "cpu"), mine, 2)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_of_two_batches_give_the_gradient_of_four_images(tmp_path: Path) -> None:
    in_two_processes(save_gradients, tmp_path)
    whole, _ = gradients(model("GN"), [images()], 1)
    for rank in range(2):
        for expected, actual in zip(whole, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


class Sampling(nn.Module):
    """A model that draws random numbers in its forward pass, as proposals are sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.drawn: list[float] = []

    def forward(self, batch: list[dict[str, str]]) -> dict[str, Tensor]:
        self.drawn.append(torch.rand(1).item())
        return {"loss": self.weight * self.drawn[-1]}


def drawn_in_steps(steps: range, accumulate_steps: int = 2, seed: int = 0) -> list[float]:
    net = Sampling()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [[{"file_name": "a.jpg"}]] * 20
    trainer = AccumulatingTrainer(net, batches, optimizer, accumulate_steps, seed=seed)
    for trainer.iter in steps:
        with EventStorage(trainer.iter):
            trainer.run_step()
    return net.drawn


def test_what_a_step_draws_does_not_depend_on_the_steps_before_it() -> None:
    whole = drawn_in_steps(range(5))
    torch.rand(7)
    assert drawn_in_steps(range(3, 5)) == whole[6:]
    assert len(set(whole)) == 10
    assert set(drawn_in_steps(range(5), seed=1)).isdisjoint(whole)


class Exploding(nn.Module):
    """Its second loss is not finite from a given call on; the gradient of one part is not."""

    def __init__(self, last_finite: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.calls, self.last_finite = 0, last_finite

    def forward(self, batch: list[dict[str, str]]) -> dict[str, Tensor]:
        features = self.body(torch.ones(1, 2))
        broken = torch.tensor(1.0 if self.calls < self.last_finite else torch.nan)
        self.calls += 1
        return {"loss_a": features.sum(), "loss_b": (self.head(features.detach()) * broken).sum()}


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_loss_that_is_not_finite_names_step_images_and_gradients(accumulate_steps: int) -> None:
    net = Exploding(last_finite=2 * accumulate_steps)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [[{"file_name": f"{i}.jpg"}] for i in range(20)]
    trainer = AccumulatingTrainer(net, batches, optimizer, accumulate_steps)
    for trainer.iter in range(2):
        with EventStorage(trainer.iter):
            trainer.run_step()
    before = copy.deepcopy(net.state_dict())
    trainer.iter = 2
    images = ", ".join(f"{i}.jpg" for i in range(2 * accumulate_steps, 3 * accumulate_steps))
    message = (
        rf"iteration 2: the loss is not finite: loss_a [-\d.]+, loss_b nan; images: {images}; "
        r"largest gradients: head nan, body [\d.]+\. .*learning rate"
    )
    with EventStorage(2), pytest.raises(InputError, match=message):
        trainer.run_step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_proposals_that_are_not_finite_name_step_images_and_weights() -> None:
    class Diverging(Exploding):
        def forward(self, batch: list[dict[str, str]]) -> dict[str, Tensor]:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    net = Diverging(0)
    nn.init.constant_(net.head.bias, torch.inf)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(net, [[{"file_name": "a.jpg"}]], optimizer)
    trainer.iter = 4
    message = (
        r"^iteration 4: Predicted boxes or scores contain Inf/NaN; images: a\.jpg; "
        r"largest weights: head inf, body [\d.]+\."
    )
    with EventStorage(4), pytest.raises(InputError, match=message):
        trainer.run_step()


def test_the_largest_norms_are_by_part_and_what_is_not_finite_comes_first() -> None:
    tensors = {
        "module.backbone.res2.0.conv1.weight": torch.tensor([[3.0, 0.0]]),
        "module.backbone.res2.0.conv2.weight": torch.tensor([4.0]),
        "head.weight": torch.tensor([2.0, torch.nan]),
        "neck.bias": torch.tensor([2.0]),
    }
    norms = largest_norms(tensors)
    assert [name for name, _ in norms] == ["head", "backbone.res2.0", "neck"]
    assert norms[1:] == [("backbone.res2.0", 5.0), ("neck", 2.0)]
    assert [name for name, _ in largest_norms(tensors, most=1)] == ["head"]


def test_shares_of_time_and_peak_memory_are_metrics() -> None:
    net = model("GN")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(net, [images()] * 2, optimizer)
    with EventStorage() as storage:
        for trainer.iter in range(2):
            storage.iter = trainer.iter
            trainer.run_step()
        latest = {name: value for name, (value, _) in storage.latest().items()}
    shares = [latest[f"share/{name}"] for name in ("data", "forward", "backward", "optimizer")]
    assert all(share > 0 for share in shares) and sum(shares) == pytest.approx(1)
    assert latest["peak_memory_mb"] > 50
