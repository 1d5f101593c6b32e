"""What is evaluated when, and on which model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gn_det import FusedGroupNorm, InputError
from gn_det.injection import convert_bn
from gn_det.studies.conversion.stages import ToDistill, convert_in_stages


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model[1].running_mean.uniform_(-1, 1)
    return model.eval()


def batches() -> list[Tensor]:
    return [torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))]


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_each_stage_is_evaluated_as_it_is() -> None:
    model, seen, kept = small(), [], []

    def evaluate(model: nn.Module) -> float:
        seen.append((type(model[1]), model[1].bias.clone()))
        return float(len(seen))

    def fine_tune(model: nn.Module) -> None:
        with torch.no_grad():
            model[1].bias.add_(1.0)

    expected = small()
    convert_bn(expected, batches(), num_groups=2)
    found = convert_in_stages(
        model, batches(), run, evaluate=evaluate, fine_tune=fine_tune, num_groups=2,
        keep=lambda model, found: kept.append((copy.deepcopy(model), [*found.metric])),
    )  # fmt: skip
    assert found.metric == {"BN": 1.0, "copied": 2.0, "calibrated": 3.0, "fine-tuned": 4.0}
    assert [kind for kind, _ in seen] == [nn.BatchNorm2d] + 3 * [FusedGroupNorm]
    biases = [bias for _, bias in seen]
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[2], expected[1].bias) and torch.equal(kept[0][0][1].bias, biases[2])
    assert kept[0][1] == ["BN", "copied", "calibrated"]
    assert torch.equal(biases[3], biases[2] + 1) and torch.equal(model[1].bias, biases[3])


def test_the_model_learns_from_the_one_that_it_was(tmp_path: Path) -> None:
    model, kept, checkpoint = small(), [], tmp_path / "distillation.checkpoint"
    task = ToDistill(batches(), batches(), lambda model, x: model(x).relu(), 40, checkpoint)
    found = convert_in_stages(
        model, batches(), run, evaluate=lambda model: 0.0, to_distill=task, num_groups=2,
        keep=lambda model, found: kept.append((copy.deepcopy(model), [*found.metric])),
    )  # fmt: skip
    assert [*found.metric] == ["BN", "copied", "calibrated", "distilled"]
    errors = [found.levels[stage]["output"] for stage in ("copied", "calibrated", "distilled")]
    assert errors[0] > errors[1] > errors[2] and len(found.losses) == 40
    assert [stages[-1] for _, stages in kept] == ["calibrated", "distilled"]
    assert torch.equal(kept[1][0][0].weight, model[0].weight)
    assert not torch.equal(kept[0][0][0].weight, model[0].weight)
    assert not checkpoint.exists()


def test_without_evaluation_there_is_the_calibration_alone() -> None:
    found = convert_in_stages(small(), batches(), run)
    assert found.metric == {} and len(found.calibration.rows) == 1


def test_a_model_without_bn_is_an_error_before_anything_is_evaluated() -> None:
    def evaluate(model: nn.Module) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(InputError, match="no BN, SyncBN or FrozenBN"):
        convert_in_stages(nn.Sequential(nn.GroupNorm(1, 2)), batches(), run, evaluate=evaluate)
