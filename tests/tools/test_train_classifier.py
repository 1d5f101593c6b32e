"""tools/train_classifier.py, and a detector that starts from what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from support.programs import ROOT, run_program

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.classification.training import read_classifier
from gn_det.config import load_config

PROGRAM = "tools/train_classifier.py"


def flags(shapes: Path, output: Path, norm: str) -> list[object]:
    return [
        "--output", output, "--network", "resnet18", "--norm", norm, "--data", shapes,
        "--size", 32, "--ims-per-gpu", 4, "--lr", 0.08, "--epochs", 1, "--schedule", "cosine",
    ]  # fmt: skip


@pytest.mark.parametrize(("norm", "recipe"), [("BN", "frozenbn"), ("BN", "bn"), ("GN", "gn")])
def test_a_detector_starts_from_every_tensor_of_the_backbone(
    norm: str, recipe: str, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    call_main(PROGRAM, *flags(shapes, tmp_path / "run", norm))
    backbone = tmp_path / "run" / "backbone.pth"
    both = tmp_path / "both.yaml"
    both.write_text(f"_BASE_: [{ROOT}/configs/compare/{recipe}.yaml, run/backbone.yaml]\n")
    cfg = load_config(both)
    assert cfg.MODEL.WEIGHTS == str(backbone)
    model = build_model(cfg)
    Checkpointer(model, trainer=torch.optim.SGD(model.parameters(), lr=1.0)).load(
        cfg.MODEL.WEIGHTS, checkpointables=[]
    )
    written = torch.load(backbone, weights_only=True)["model"]
    body = model.backbone.bottom_up.state_dict()
    assert body.keys() <= written.keys()
    assert all(torch.equal(value, written[key]) for key, value in body.items())
    assert json.loads((tmp_path / "run/recipe.json").read_text())["norm"] == norm
    assert 0 <= json.loads((tmp_path / "run/results.json").read_text())["val_error"] <= 100


def test_a_finished_run_is_kept(shapes: Path, tmp_path: Path, call_main: Callable) -> None:
    call_main(PROGRAM, *flags(shapes, tmp_path / "run", "GN"))
    before = (tmp_path / "run" / "model_final.pth").read_bytes()
    with pytest.raises(InputError, match="holds a run already; --resume continues"):
        call_main(PROGRAM, *flags(shapes, tmp_path / "run", "BN"))
    with pytest.raises(InputError, match="norm is 'GN' in the run, 'BN'"):
        call_main(PROGRAM, *flags(shapes, tmp_path / "run", "BN"), "--resume")
    assert (tmp_path / "run" / "model_final.pth").read_bytes() == before


@pytest.mark.slow
def test_processes_share_the_pictures_and_synchronise_what_is_to_be(tmp_path: Path) -> None:
    done = run_program(
        PROGRAM, "--output", tmp_path / "run", "--data", "digits", "--network", "resnet10",
        "--norm", "SyncBN", "--epochs", 1, "--num-gpus", 2, "--device", "cpu", "--num-workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resnet10 with SyncBN: validation error" in done.stdout
    iterations = [
        json.loads(line)["iteration"]
        for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()
    ]
    assert max(iterations) in (1437 // 64 - 1, 1437 // 64)
    read_classifier(tmp_path / "run")


@pytest.mark.slow
def test_mixed_precision_on_the_cpu_and_a_missing_gpu_are_one_line(tmp_path: Path) -> None:
    for more, message in (
        (["--amp"], "mixed precision needs a GPU"),
        (["--device", "cuda:7"], "device cuda:7 is asked for"),
    ):
        flags = ["--output", tmp_path / "run", "--data", "digits", "--device", "cpu"]
        done = run_program(PROGRAM, *flags, *more)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
