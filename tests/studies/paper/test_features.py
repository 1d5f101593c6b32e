"""Percentiles of a layer's values over a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import EvalHook
from matplotlib.figure import Figure
from support.plots import lines_of
from torch import nn

from gn_det import FusedGroupNorm, InputError, fuse
from gn_det.studies.paper.features import (
    FeatureDistribution,
    features_csv,
    plot_features,
    read_features,
)


class Model(nn.Module):
    """conv, norm, ReLU of the batch that is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), FusedGroupNorm(8), nn.ReLU())
        self.dict = nn.Identity()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.dict({"loss": self.body(x).mean()})


def train(model: nn.Module, file: Path, module: str, iterations: int, records: int) -> None:
    batches = [torch.randn(2, 3, 4, 4) for _ in range(iterations)]
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([FeatureDistribution(file, module, records)])
    trainer.train(0, iterations)


def test_percentiles_are_of_the_modules_output_before_norm_and_relu(tmp_path: Path) -> None:
    model = fuse(Model())
    seen = []
    model.body[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    train(model, tmp_path / "f.json", "body.0", iterations=10, records=5)
    features = read_features(tmp_path / "f.json")
    assert list(features) == [1, 20, 80, 99] and list(features[1]) == [0, 2, 4, 6, 8]
    for percentile, values in features.items():
        for iteration, value in values.items():
            expected = np.percentile(seen[iteration].detach().numpy(), percentile)
            assert value == pytest.approx(expected, rel=1e-5)
    assert not model.body[1]._forward_hooks


def test_what_a_block_changes_in_place_is_recorded_as_it_was(tmp_path: Path) -> None:
    class Block(Model):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            out = self.body[0](x)
            out += 100.0
            return {"loss": torch.relu_(out).mean()}

    train(Block(), tmp_path / "f.json", "body.0", iterations=1, records=1)
    assert max(read_features(tmp_path / "f.json")[99].values()) < 50


def test_evaluations_are_not_recorded(tmp_path: Path) -> None:
    model = Model()
    batches = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))

    def evaluate() -> None:
        model.eval()
        model(torch.full((2, 3, 4, 4), 1e6))
        model.train()

    hooks = [EvalHook(1, evaluate), FeatureDistribution(tmp_path / "f.json", "body.0", 2)]
    trainer.register_hooks(hooks)
    trainer.train(0, 2)
    assert max(read_features(tmp_path / "f.json")[99].values()) < 1e3


def test_more_records_than_iterations_are_one_each(tmp_path: Path) -> None:
    train(Model(), tmp_path / "f.json", "body", iterations=3, records=100)
    assert list(read_features(tmp_path / "f.json")[20]) == [0, 1, 2]


def test_an_iteration_that_was_gone_over_again_has_its_last_values(tmp_path: Path) -> None:
    for _ in range(2):
        train(Model(), tmp_path / "f.json", "body", iterations=2, records=2)
    assert len((tmp_path / "f.json").read_text().splitlines()) == 4
    assert list(read_features(tmp_path / "f.json")[20]) == [0, 1]


@pytest.mark.parametrize(
    ("module", "message"),
    [("body.7", "Model has no module 'body.7'"), ("dict", "dict gave dict, not a tensor")],
)
def test_what_has_no_values_is_an_error(module: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(Model(), tmp_path / "f.json", module, iterations=2, records=2)
    with pytest.raises(InputError, match=r"f\.json has no features of a layer; remove"):
        read_features(tmp_path / "f.json")


def test_numbers_and_picture(tmp_path: Path, figures: list[Figure]) -> None:
    train(Model(), tmp_path / "f.json", "body", iterations=3, records=3)
    features = {name: read_features(tmp_path / "f.json") for name in ("none", "GN")}
    lines = features_csv(features).splitlines()
    assert lines[0] == "run,iteration,p1,p20,p80,p99" and len(lines) == 7
    plot_features(features, "body", tmp_path / "f.png")
    drawn = {axes.get_title(): lines_of(axes) for axes in figures[0].axes}
    assert drawn == {
        run: {f"{p}%": [*values[p].items()] for p in values} for run, values in features.items()
    }
