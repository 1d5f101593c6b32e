"""tools/convert_classifier_to_gn.py, from a classifier with BN to a detector's GN backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from support.programs import ROOT

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.classification.training import ClassifierRecipe, train_classifier
from gn_det.config import load_config

PROGRAM = "tools/convert_classifier_to_gn.py"


def trained(folder: Path, norm: str, data: Path) -> Path:
    folder.mkdir()
    recipe = ClassifierRecipe(str(data), "resnet18", norm, size=32, epochs=1, ims_per_gpu=4)
    train_classifier(recipe, folder, quiet=True)
    return folder


def test_what_is_converted_is_calibrated_fine_tuned_and_a_detectors_backbone(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trained(tmp_path / "bn", "BN", shapes)
    output = tmp_path / "gn"
    call_main(
        PROGRAM, source, output, "--calibration-pictures", 8, "--fine-tune", 1, "--device", "cpu"
    )
    assert "calibrated" in capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert list(report["stages"]) == ["BN", "copied", "calibrated", "fine-tuned"]
    own = json.loads((source / "results.json").read_text())["val_error"]
    assert report["stages"]["BN"] == pytest.approx(own)
    errors = report["calibration"]["pass_errors"]
    assert min(errors) < errors[0]
    assert "By stage" in (output / "report.md").read_text()
    assert (output / "conversion.png").exists()

    before = torch.load(source / "backbone.pth", weights_only=True)["model"]
    after = torch.load(output / "backbone.pth", weights_only=True)["model"]
    convs = [key for key in after if "norm" not in key]
    assert len(convs) == 20 and all(torch.equal(after[key], before[key]) for key in convs)
    both = tmp_path / "both.yaml"
    both.write_text(f"_BASE_: [{ROOT}/configs/compare/gn.yaml, gn/backbone.yaml]\n")
    cfg = load_config(both)
    model = build_model(cfg)
    Checkpointer(model, trainer=torch.optim.SGD(model.parameters(), lr=1.0)).load(
        cfg.MODEL.WEIGHTS, checkpointables=[]
    )
    body = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in body.items())
    with pytest.raises(InputError, match="gn is there and no empty folder"):
        call_main(PROGRAM, source, output)


def test_what_cannot_be_converted_is_an_error(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    source = trained(tmp_path / "gn", "GN", shapes)
    with pytest.raises(InputError, match="has no BN, SyncBN or FrozenBN layer"):
        call_main(PROGRAM, source, tmp_path / "out", "--calibration-pictures", 2)
    with pytest.raises(InputError, match=r"--calibration-pictures 9999: from 1 to"):
        call_main(PROGRAM, source, tmp_path / "out", "--calibration-pictures", 9999)
    with pytest.raises(InputError, match="no finished classifier"):
        call_main(PROGRAM, tmp_path / "nowhere", tmp_path / "out")
