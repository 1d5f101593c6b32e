"""tools/audit_norms.py on configs of Detectron2's zoo and of gn_det."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import zoo
from support.programs import ROOT, run_program

from gn_det import InputError

TOOL = "tools/audit_norms.py"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def test_a_config_of_the_zoo_is_shown_as_it_builds(
    call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    call_main(TOOL, "--config-file", MASK_RCNN, "--format", "json")
    read = json.loads(capsys.readouterr().out)
    assert read["rows"] == []
    left = {each["site"]: len(each["modules"]) for each in read["left_alone"]}
    assert left["backbone"] == 53 and left["fpn"] == 8


def test_sites_are_injected_and_fused(
    call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    call_main(TOOL, "--config-file", MASK_RCNN, "--sites", "ALL", "--format", "markdown")
    printed = capsys.readouterr().out
    assert "67 in all" in printed and "GN+GN+add+ReLU" in printed
    assert "NUM_CONV" in printed  # the box head of two fully connected layers


@pytest.mark.parametrize("name", ["configs/small/quickstart.yaml", "configs/small/quickstart.py"])
def test_our_own_configs_are_shown(
    name: str, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    call_main(TOOL, "--config-file", ROOT / name)
    assert "32 in all" in capsys.readouterr().out  # 20 in the body, 8, 2 and 2


def test_a_lazy_model_of_the_zoo_takes_overrides(
    call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "common/models/fcos.py"
    call_main(TOOL, "--config-file", name, "--sites", "fpn", "--", "model.backbone.out_channels=48")
    assert "24*" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such.yaml"], "no/such.yaml is no file, and no config of Detectron2's model zoo"),
        ([MASK_RCNN, "--sites", "dense_head"], "site dense_head: GeneralizedRCNN has none"),
        ([MASK_RCNN, "MODEL.FPM", "1"], "no config key MODEL.FPM"),
        (
            ["Misc/mask_rcnn_R_50_FPN_3x_gn.yaml", "MODEL.FPN.OUT_CHANNELS", "48"],
            r"cannot be built as .* num_channels \(48\) must be divisible",
        ),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(
    arguments: list[str], message: str, call_main: Callable
) -> None:
    with pytest.raises(InputError, match=message):
        call_main(TOOL, "--config-file", *arguments)


def test_the_program_prints_the_table_and_nothing_else(tmp_path: Path) -> None:
    assert (zoo.CONFIGS / MASK_RCNN).is_file()
    done = run_program(TOOL, "--config-file", MASK_RCNN, "--sites", "fpn", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("site ")
    assert not done.stderr and not list(tmp_path.iterdir())
