"""Training classifiers by the paper's recipe."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from torch.utils.data import Dataset

from gn_det import InputError
from gn_det.classification import training as engine
from gn_det.classification.networks import build_classifier
from gn_det.classification.training import (
    SCHEDULES,
    ClassifierRecipe,
    error_rate,
    read_classifier,
    train_classifier,
    write_backbone_of,
)
from gn_det.config import load_config
from gn_det.engine.termination import TERMINATED
from gn_det.plots.curves import read_metrics

SMALL = {"data": "colours", "network": "resnet10", "norm": "GN", "epochs": 3, "ims_per_gpu": 8}


class Colours(Dataset):
    """Pictures of one of two colours, which is their class; noisy in training."""

    classes = ("dark", "bright")

    def __init__(self, size: int, length: int = 44) -> None:
        self.size = size
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        label = index % 2
        image = torch.full((3, self.size, self.size), 200.0 if label else 50.0)
        return {"image": image + torch.randn(()), "label": label, "file_name": f"{index}"}


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine,
        "load_images",
        lambda data, size, max_objects: (Colours(size or 8), Colours(size or 8, 7)),
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_what_can_be_told_apart_is_learnt_and_again_the_same(tmp_path: Path) -> None:
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        results = train_classifier(ClassifierRecipe(**SMALL), tmp_path / name, quiet=True)
        assert results["val_error"] == 0 and results["train_error"] < 50
    once, again = weights_of(tmp_path / "once"), weights_of(tmp_path / "again")
    assert all(torch.equal(value, again[key]) for key, value in once.items())
    assert len(results["val_errors"]) == len(results["train_errors"]) == 3
    errors = read_metrics(tmp_path / "once" / "metrics.json")
    assert [*errors["error/val"].values()] == results["val_errors"]
    file = tmp_path / "once" / "recipe.json"
    settings = json.loads(file.read_text())
    del settings["max_objects"]  # as in those that are older than it
    file.write_text(json.dumps(settings))
    _, loaded = read_classifier(tmp_path / "once")
    assert error_rate(loaded, Colours(8)) == 0


class Terminate(HookBase):
    """SIGTERM in a step."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("when", ["in a step", "in an evaluation", "in the last evaluation"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ClassifierRecipe(**SMALL)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train_classifier(recipe, tmp_path / "whole", quiet=True)
    evaluations = []

    def terminated(*args: object, **kwargs: object) -> float:
        evaluations.append(0)
        if len(evaluations) == {"in an evaluation": 2, "in the last evaluation": 3}.get(when):
            os.kill(os.getpid(), signal.SIGTERM)
        return error_rate(*args, **kwargs)

    monkeypatch.setattr(engine, "error_rate", terminated)
    monkeypatch.setattr(os, "_exit", sys.exit)
    more = [Terminate(6)] if when == "in a step" else []
    with pytest.raises(SystemExit) as ended:
        train_classifier(recipe, tmp_path / "parts", quiet=True, more_hooks=more)
    assert ended.value.code == TERMINATED and not (tmp_path / "parts/results.json").exists()
    parts = train_classifier(recipe, tmp_path / "parts", quiet=True, resume=True)
    assert parts == whole and len(parts["val_errors"]) == 3
    before, after = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert train_classifier(recipe, tmp_path / "parts", quiet=True, resume=True) == whole


def test_a_run_goes_on_with_its_own_recipe_alone(tmp_path: Path) -> None:
    train_classifier(ClassifierRecipe(**{**SMALL, "epochs": 1}), tmp_path, quiet=True)
    with pytest.raises(InputError, match="epochs is 1 in the run, 3 .*; lr is 0.1 in the run, 0.2"):
        train_classifier(ClassifierRecipe(**SMALL, lr=0.2), tmp_path, quiet=True, resume=True)


def test_a_run_goes_on_with_as_many_processes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_classifier(ClassifierRecipe(**SMALL), tmp_path, quiet=True)
    monkeypatch.setattr(engine.comm, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="ims_per_step is 8 in the run, 16"):
        train_classifier(ClassifierRecipe(**SMALL), tmp_path, quiet=True, resume=True)


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"norm": "GN", "num_groups": 8}, "MODEL.GN.NUM_GROUPS", 8),
        ({"norm": "GN", "channels_per_group": 4}, "MODEL.GN.CHANNELS_PER_GROUP", 4),
        ({"norm": "LN"}, "MODEL.GN.NUM_GROUPS", 1),
        ({"norm": "IN"}, "MODEL.GN.CHANNELS_PER_GROUP", 1),
    ],
)
def test_a_detector_is_told_the_groups(
    settings: dict, key: str, value: int, tmp_path: Path
) -> None:
    recipe = ClassifierRecipe("colours", "resnet18", **settings)
    write_backbone_of(tmp_path / "b.pth", recipe, recipe.build(2))
    fragment = load_config(tmp_path / "b.yaml")
    for part in key.split("."):
        fragment = fragment[part]
    assert fragment == value


def test_the_learning_rate_is_the_papers(tmp_path: Path) -> None:
    steps = SCHEDULES["steps"]
    factors = [steps(epoch / 100) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert factors == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert SCHEDULES["cosine"](0.1) == pytest.approx(math.cos(math.pi * 0.05) ** 2)
    train_classifier(ClassifierRecipe(**{**SMALL, "epochs": 1}), tmp_path, quiet=True)
    lr = read_metrics(tmp_path / "metrics.json")["lr"]
    assert max(lr.values()) <= 0.1 * 8 / 32


def test_every_parameter_decays_as_the_papers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: seen.append(sgd(*a, **k)) or seen[-1])
    train_classifier(ClassifierRecipe(**{**SMALL, "epochs": 1}), tmp_path, quiet=True)
    (group,) = seen[0].param_groups
    assert group["weight_decay"] == 1e-4
    assert len(group["params"]) == len([*build_classifier("resnet10", "GN", 2).parameters()])


def test_the_error_is_the_median_of_the_last_five_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ClassifierRecipe(**{**SMALL, "epochs": 7, "ims_per_gpu": 22})
    rates = iter([7, 1, 9, 3, 5, 6, 2])
    monkeypatch.setattr(engine, "error_rate", lambda *args, **kwargs: next(rates))
    results = train_classifier(recipe, tmp_path, quiet=True)
    assert results["val_errors"] == [7, 1, 9, 3, 5, 6, 2] and results["val_error"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ims_per_gpu": 64}, "44 images do not make a step of 64"),
        ({"epochs": 0}, "epochs 0, ims_per_gpu 8"),
        ({"lr": 1e9}, "the loss is not finite"),
        ({"norm": "BN", "num_groups": 4}, "num_groups 4"),
        ({"num_groups": 0}, "num_groups is 0, and has to be at least 1"),
        ({"amp": True}, "mixed precision needs a GPU"),
    ],
)
def test_what_cannot_be_trained_is_an_error(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_classifier(ClassifierRecipe(**{**SMALL, **change}), tmp_path, quiet=True)
    assert not (tmp_path / "results.json").exists()


def test_what_is_not_finished_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"data": "digits"}))
    with pytest.raises(InputError, match="has no finished classifier of tools/train_classifier"):
        read_classifier(tmp_path)
