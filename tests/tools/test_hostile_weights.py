"""Weights that would run something are refused by whatever loads weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.hostile import REFUSED, write_hostile
from support.programs import ROOT, TINY, folder_flags

from gn_det import InputError
from gn_det.config import load_config
from gn_det.engine.predictor import Predictor

YAML = ["--config-file", ROOT / "configs/small/quickstart.yaml"]
LAZY = ["--config-file", ROOT / "configs/small/quickstart.py"]


def predictor(call_main: Callable, weights: Path, shapes: Path) -> None:
    Predictor(load_config(YAML[1], ["MODEL.WEIGHTS", str(weights)]))


def demo(call_main: Callable, weights: Path, shapes: Path) -> None:
    inputs = ["--input", shapes / "images", "--output", weights.parent / "drawn"]
    call_main("demo/demo.py", *YAML, "--weights", weights, *inputs)


def train(call_main: Callable, weights: Path, shapes: Path) -> None:
    options = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", weights.parent / "run", *TINY]
    call_main("tools/train_net.py", *YAML, *folder_flags(shapes), *options)


def evaluate(call_main: Callable, weights: Path, shapes: Path) -> None:
    options = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", weights.parent / "run", *TINY]
    call_main("tools/train_net.py", *YAML, *folder_flags(shapes), "--eval-only", *options)


def train_lazily(call_main: Callable, weights: Path, shapes: Path) -> None:
    options = [f"train.init_checkpoint={weights}", f"train.output_dir={weights.parent / 'run'}"]
    call_main("tools/lazyconfig_train_net.py", *LAZY, *folder_flags(shapes), *options)


@pytest.mark.parametrize("load", [predictor, demo, train, evaluate, train_lazily])
@pytest.mark.parametrize("ending", [".pkl", ".pth", ".pyth", ".safetensors"])
def test_a_hostile_file_does_not_run(
    ending: str, load: Callable, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    weights, mark = tmp_path / f"weights{ending}", tmp_path / "mark"
    write_hostile(weights, mark, {"model": {}, "model_state": {}})
    refusal = "cannot be read as weights" if ending == ".safetensors" else REFUSED
    with pytest.raises(InputError, match=refusal):
        load(call_main, weights, shapes)
    assert not mark.exists()


def test_a_run_is_not_resumed_from_a_hostile_checkpoint(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    options = ["OUTPUT_DIR", tmp_path / "run", *TINY]
    call_main("tools/train_net.py", *YAML, *folder_flags(shapes)[:3], *options)
    checkpoint = tmp_path / "run" / "model_final.pth"
    content = torch.load(checkpoint, weights_only=True)
    write_hostile(checkpoint, tmp_path / "mark", content)
    with pytest.raises(InputError, match=rf"model_final\.pth {REFUSED}"):
        call_main("tools/train_net.py", *YAML, *folder_flags(shapes)[:3], "--resume", *options)
    assert not (tmp_path / "mark").exists()


def test_hostile_files_would_run_if_they_were_unpickled(tmp_path: Path) -> None:
    for ending in (".pkl", ".pth"):
        weights, mark = tmp_path / f"weights{ending}", tmp_path / f"mark{ending}"
        write_hostile(weights, mark, {})
        if ending == ".pth":
            torch.load(weights, weights_only=False)
        else:
            pickle.loads(weights.read_bytes())
        assert mark.exists()
