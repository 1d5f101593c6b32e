"""tools/measure_accumulation.py on the generated shapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.programs import ROOT, load_program

from gn_det import InputError, get_config
from gn_det.studies import accumulation

TOOL = "tools/measure_accumulation.py"
CONFIG = ROOT / "configs/small/quickstart.yaml"
FEW = ["MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "40"]
FEW += ["DATALOADER.ASPECT_RATIO_GROUPING", "False"]  # so that some pictures differ in size


def flags(folder: Path, output: Path) -> list[object]:
    train = ["--train", folder / "train.json", folder / "images"]
    return ["--config-file", CONFIG, "--output", output, *train]


@pytest.mark.slow
def test_prints_both_tables_and_writes_them(
    shapes: Path,
    tmp_path: Path,
    call_main: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_pair = functools.partial(accumulation.training_pairs, most=1)
    monkeypatch.setattr(accumulation, "training_pairs", one_pair)
    call_main(TOOL, *flags(shapes, tmp_path / "new"), *FEW)
    printed = capsys.readouterr().out
    assert "median of 1 pairs, 1 of them padded" in printed
    tables = json.loads((tmp_path / "new" / "accumulation.json").read_text())
    assert (tmp_path / "new" / "accumulation.md").read_text() in printed
    for table in ("gradients", "padding"):
        for row in tables[table]:
            line = next(x for x in printed.splitlines() if f"| {next(iter(row.values()))} " in x)
            cells = [cell.strip() for cell in line.split("|")[2:-1]]
            assert cells == [f"{value:.2g}" for value in list(row.values())[1:]]


def test_the_model_has_the_weights_or_a_start_that_is_repeated(tmp_path: Path) -> None:
    build = load_program(TOOL).build
    cfg = get_config("small/quickstart.yaml")
    cfg.MODEL.DEVICE = "cpu"
    start, again = build(cfg).state_dict(), build(cfg).state_dict()
    assert all(torch.equal(start[key], again[key]) for key in start)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": {key: value + 1 for key, value in start.items()}}, cfg.MODEL.WEIGHTS)
    loaded = build(cfg).state_dict()
    assert all(torch.equal(start[key] + 1, loaded[key]) for key in start)


def test_weights_that_are_not_there_are_told_first(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    with pytest.raises(InputError, match="none.pth do not exist"):
        call_main(TOOL, *flags(shapes, tmp_path / "out"), "MODEL.WEIGHTS", "none.pth")
    assert not (tmp_path / "out").exists()


def test_a_data_set_of_one_image_is_refused(
    edit_shapes: Callable[..., Path], tmp_path: Path, call_main: Callable
) -> None:
    def keep_one(dataset: dict) -> None:
        first = dataset["annotations"][0]["image_id"]
        dataset["images"] = [i for i in dataset["images"] if i["id"] == first]
        dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] == first]

    with pytest.raises(InputError, match="^custom_train has no two images"):
        call_main(TOOL, *flags(edit_shapes(keep_one), tmp_path / "out"))
