"""A step of several batches: with GN, and not BN, the gradient of one of all their images."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from gn_det import FusedGroupNorm, fuse
from gn_det.engine.step import AccumulatingTrainer
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
    with pytest.raises(FloatingPointError, match="iteration=0"):
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


def in_process(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.set_num_threads(1)
    mine = list(images()[2 * rank : 2 * rank + 2].split(1))
    found, _ = gradients(wrap_ddp(model("GN"), "cpu"), mine, 2)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_of_two_batches_give_the_gradient_of_four_images(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_process, (port, tmp_path), nprocs=2)
    whole, _ = gradients(model("GN"), [images()], 1)
    for rank in range(2):
        for expected, actual in zip(whole, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
