"""What is checked before a run begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.engine.command import RunOptions
from gn_det.engine.resume import begin_or_resume
from gn_det.engine.run import check_run, check_start


def test_frozen_layers_need_weights() -> None:
    with pytest.raises(InputError, match=r"FREEZE_AT 2 freezes .*\(for a LazyConfig, freeze_at"):
        check_start("", 2)
    check_start("weights.pth", 2)
    check_start("", 0)


def test_a_run_that_cannot_be_resumed_keeps_the_copy_that_it_began_with(
    edit_shapes: Callable, tmp_path: Path
) -> None:
    def begin(options: RunOptions) -> None:
        cfg = load_config(ROOT / "configs/small/quickstart.yaml")
        data = check_run(cfg, options, tmp_path)
        begin_or_resume(cfg, tmp_path, data, options)
        data.write_copies()

    folder = edit_shapes(lambda d: [a.pop("iscrowd") for a in d["annotations"]])
    train = str(folder / "train.json"), str(folder / "images")
    begin(RunOptions(train=train))
    copy = tmp_path / "datasets" / "custom_train.json"
    before = copy.read_bytes()
    (tmp_path / "model_0000003.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    dataset = json.loads((folder / "train.json").read_text())
    dataset["annotations"].pop()
    (folder / "train.json").unlink()
    (folder / "train.json").write_text(json.dumps(dataset))
    with pytest.raises(InputError, match="custom_train is another than the run began with"):
        begin(RunOptions(train=train, resume=True))
    assert copy.read_bytes() == before
