"""tools/audit_norms.py on configs of Detectron2's zoo and of gn_det."""

from __future__ import annotations

import json
import subprocess
import sys
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


MMENGINE = {
    "a type": "model = dict(type='ConvModule', in_channels=3, out_channels=64, kernel_size=3,\n"
    "             norm_cfg=dict(type='BN'))\n",
    "a dict": "model = {'type': 'ConvModule', 'in_channels': 3, 'out_channels': 64,\n"
    "         'kernel_size': 3, 'norm_cfg': {'type': 'BN'}}\n",
    "a base": "_base_ = 'a_type.py'\nmodel = dict(out_channels=64)\n",
    "an import": "custom_imports = dict(imports=['gn_det.mmcv_plugin'])\n_base_ = 'a_type.py'\n",
}


@pytest.mark.parametrize("case", MMENGINE)
def test_a_config_of_mmengine_is_shown(
    case: str, call_main: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import mmcv.cnn  # noqa: F401 (registration)

    (tmp_path / "a_type.py").write_text(MMENGINE["a type"])
    (tmp_path / "config.py").write_text(MMENGINE[case])
    name = tmp_path / "config.py"
    call_main(TOOL, "--config-file", name, "--format", "json")
    read = json.loads(capsys.readouterr().out)
    assert [(row["modules"], row["reason"]) for row in read["left_alone"]] == [
        (["bn"], "BatchNorm2d; inject replaces it")
    ]
    call_main(
        TOOL, "--config-file", name, "--format", "json", "--sites", "ALL", "--",
        "model.out_channels=48",
    )  # fmt: skip
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["modules"], row["channels"]) == (["bn"], 48)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("_base_ = 'mmocr::textdet/x.py'\n", [], "cannot be built as .* mmocr is not installed"),
        ("default_scope = None\n", [], "has no model"),
        ("model = dict(type='Unheard')\n", [], "cannot be built .*Unheard is not in the"),
        (MMENGINE["a type"], ["--", "model.out_channels", "48"], "is no override .* key=value"),
    ],
)
def test_a_config_of_mmengine_that_cannot_be_shown_is_told_in_a_line(
    text: str, overrides: list[str], message: str, call_main: Callable, tmp_path: Path
) -> None:
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(InputError, match=message):
        call_main(TOOL, "--config-file", tmp_path / "config.py", "--sites", "ALL", *overrides)


def test_a_package_that_is_not_there_is_told_and_not_installed(
    call_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object, **options: object) -> None:
        pytest.fail(f"ran {arguments}")

    for name in ("check_call", "run", "Popen", "call"):
        monkeypatch.setattr(subprocess, name, run)
    with pytest.raises(InputError, match="mmocr is not installed"):
        call_main(TOOL, "--config-file", "mmocr::textdet/x.py")


def test_an_absent_mmengine_is_told(
    call_main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    (tmp_path / "config.py").write_text(MMENGINE["a type"])
    with pytest.raises(InputError, match="is a config of mmengine, which is not in this env"):
        call_main(TOOL, "--config-file", tmp_path / "config.py")
