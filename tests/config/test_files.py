"""Finding and reading config files."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from _pytest.mark import ParameterSet
from detectron2.config import CfgNode
from support.models import audited
from support.programs import ROOT

from gn_det import InputError, get_config
from gn_det.config import dump_config, load_config, load_lazy_config

YAML_CONFIGS = sorted(p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml"))


@functools.cache
def loaded(name: Path) -> CfgNode:
    """A shipped config; not to be changed."""
    return get_config(str(name))


GN_CONFIGS = [
    name for name in YAML_CONFIGS if loaded(name).MODEL.META_ARCHITECTURE.startswith("GN")
]


def slow(name: Path) -> ParameterSet:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "name",
    [  # The other recipes differ from these in depth, start and schedule.
        n if n.parts[0] != "coco" or re.search("_1x|_ws_", n.name) else slow(n) for n in GN_CONFIGS
    ],
    ids=str,
)
def test_a_config_with_gn_builds_a_model_whose_norms_are_fused_with_what_follows(
    name: Path,
) -> None:
    cfg = loaded(name)
    rows = audited(cfg).rows
    of_timm = name.parts[:2] == ("compare", "photos")  # ReLU6 follows the norms of its backbone
    assert of_timm or any("ReLU" in row.form for row in rows)
    # Nothing follows the output convolutions of the FPN and its lateral one at the top.
    unfused = {row.site for row in rows if row.form.removeprefix("WS+") == "GN"}
    assert unfused <= ({"fpn", "backbone"} if of_timm else {"fpn"})
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == 0.0


@pytest.mark.parametrize("name", [n for n in GN_CONFIGS if n.parts[0] == "small"], ids=str)
def test_a_small_config_has_gn_at_all_default_sites(name: Path) -> None:
    left_alone = audited(loaded(name)).left_alone
    bare = [left for left in left_alone if not left.reason.startswith(("a predictor", "not fused"))]
    places = {left.site for left in bare}
    assert places == {"rpn", "mask_head.deconv"}


@pytest.mark.parametrize("name", YAML_CONFIGS, ids=str)
def test_a_config_that_was_dumped_loads_again(name: Path, write: Callable[[str], Path]) -> None:
    dumped = loaded(name).dump()
    assert yaml.safe_load(load_config(write(dumped)).dump()) == yaml.safe_load(dumped)


def test_a_name_that_is_not_shipped_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean small/quickstart\.yaml"):
        get_config("small/quickstat.yaml")


def test_auto_device_is_what_the_machine_has_and_an_explicit_one_stays() -> None:
    assert load_config(None).MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_config(None, ["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cuda"


def test_overrides_come_last(write: Callable[[str], Path]) -> None:
    path = write("SOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\nVERSION: 2\n")
    cfg = load_config(path, ["SOLVER.BASE_LR", "0.25"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.25, 7)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("MODEL: {RESNET: {DEPTH: 18}}\nVERSION: 2", [], r"no config key MODEL\.RESNET; did you"),
        ("VERSION: 2", ["SOLVER.BASELR", "1"], r"SOLVER\.BASELR; did you mean SOLVER\.BASE_LR\?"),
        ("VERSION: 2", ["SOLVER.BASE_LR"], r"SOLVER\.BASE_LR has no value"),
        ("SOLVER: 5", [], r"SOLVER is a section; set SOLVER\.KEY"),
        ("VERSION: 2", ["SOLVER", "5"], r"SOLVER is a section; set SOLVER\.KEY"),
        ("VERSION: 2\n_BASE_: 5", [], "line 2: _BASE_ is no name of a config file"),
        ("_BASE_: ''", [], "line 1: _BASE_ is no name"),
        ("_BASE_:", [], "_BASE_ is no name"),
        ("_BASE_: {a: 1}", [], "_BASE_ is no name"),
        ("_BASE_: [b.yaml, 3]", [], "is no name"),
        ("5: 6", [], "line 1: a key is no text"),
        ("? [a, b]\n: 6", [], "a key is no text"),
        ("VERSION: 2", ["SOLVER.MAX_ITER", "many"], r"SOLVER\.MAX_ITER is many, of the type str"),
        ("VERSION: 2", ["SOLVER.BASE_LR", "1"], r"BASE_LR is 1, .*a float; write 1\.0"),
        ("", [], "holds no config keys"),
        ("- 1\n- 2", [], "holds no config keys"),
        ("MODEL: {", [], "is no YAML"),
        ("MODEL:\n  # DEVICE: cpu\nVERSION: 2", [], "MODEL"),
        ("MODEL: 3\nVERSION: 2", [], "MODEL"),
        ("_BASE_: config.yaml\nVERSION: 2", [], "leads back to its beginning"),
        ("VERSION: 2", ["OUTPUT_DIR", "x", "--num-gpus", "2"], "--num-gpus .* flags come first"),
        ("_BASE_: nowhere.yaml\nVERSION: 2", [], "nowhere.yaml"),
    ],
)
def test_what_is_wrong_with_a_config_is_told_in_one_line(
    write: Callable[[str], Path], text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(write(text), overrides)
    assert "\n" not in str(caught.value)


def test_a_config_file_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml does not exist"):
        load_config("nowhere.yaml")


def test_lazy_overrides_apply_and_wrong_keys_suggest_the_nearest() -> None:
    path = ROOT / "configs" / "small" / "quickstart.py"
    cfg = load_lazy_config(path, ["train.max_iter=3", "optimizer.lr=0.5", "+train.note=hello"])
    assert (cfg.train.max_iter, cfg.optimizer.lr, cfg.train.note) == (3, 0.5, "hello")
    with pytest.raises(InputError, match=r"train\.maxiter; did you mean train\.max_iter\?"):
        load_lazy_config(path, ["train.maxiter=3"])
    with pytest.raises(InputError, match="key=value"):
        load_lazy_config(path, ["train.max_iter", "3"])


def test_lazy_overrides_that_hydra_cannot_read_are_told_in_one_line() -> None:
    path = ROOT / "configs" / "small" / "quickstart.py"
    with pytest.raises(InputError, match="the overrides") as caught:
        load_lazy_config(path, ["train.output_dir=[1"])
    assert "\n" not in str(caught.value)


def test_a_dumped_config_suits_another_machine() -> None:
    automatic = yaml.safe_load(dump_config(load_config(None)))
    assert automatic["MODEL"]["DEVICE"] == "auto"
    other = yaml.safe_load(dump_config(load_config(None, ["MODEL.DEVICE", "cuda:3"])))
    assert other["MODEL"]["DEVICE"] == "cuda:3"


def test_a_lazy_config_must_be_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "dumped.yaml").write_text("train: {max_iter: 1}")
    with pytest.raises(InputError, match=r"is no \.py file"):
        load_lazy_config(tmp_path / "dumped.yaml")
