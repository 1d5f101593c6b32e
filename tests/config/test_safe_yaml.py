"""A YAML config cannot run code, unless it lies inside Detectron2."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import detectron2
import pytest
from detectron2.config import get_cfg

from gn_det import InputError
from gn_det.config import load_config, safe_yaml

RETINANET = (
    Path(detectron2.__file__).parent / "model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml"
)


def hostile(marker: Path) -> str:
    return f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{marker}"]\n'


def test_a_hostile_config_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(hostile(tmp_path / "ran"))
    with pytest.raises(InputError, match="tags that run Python are refused"):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / "ran").exists()


def test_detectron2s_own_loader_would_have_run_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(hostile(tmp_path / "ran"))
    get_cfg().merge_from_file(str(tmp_path / "config.yaml"))
    assert (tmp_path / "ran").exists()


def test_a_hostile_base_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(hostile(tmp_path / "ran"))
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\nVERSION: 2\n")
    with pytest.raises(InputError, match=r"base\.yaml"):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / "ran").exists()


def test_detectron2s_configs_compute_their_anchors(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f'_BASE_: "{RETINANET}"\nSOLVER: {{MAX_ITER: 3}}\n')
    for path in (RETINANET, tmp_path / "config.yaml"):
        sizes = load_config(path).MODEL.ANCHOR_GENERATOR.SIZES
        assert [round(size, 1) for size in sizes[0]] == [32, 40.3, 50.8]


def test_a_folder_or_link_called_detectron2_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    path = tmp_path / "detectron2" / "config.yaml"
    path.write_text(hostile(tmp_path / "ran"))
    (tmp_path / "link.yaml").symlink_to(path)
    for name in (path, tmp_path / "link.yaml"):
        with pytest.raises(InputError, match="refused"):
            load_config(name)


def test_configs_that_an_install_from_the_repository_links_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(RETINANET.parents[1], tmp_path / "clone" / "configs")
    monkeypatch.setattr(safe_yaml, "_DETECTRON2", (tmp_path / "clone" / "configs",))
    (tmp_path / "configs").symlink_to(tmp_path / "clone" / "configs")
    path = tmp_path / "configs" / "COCO-Detection" / RETINANET.name
    assert load_config(path).MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32


def test_a_base_is_not_fetched_from_the_network(tmp_path: Path) -> None:
    address = "https://a.org/../../.local/lib/python3.11/site-packages/evil.yaml"
    (tmp_path / "config.yaml").write_text(f"_BASE_: {address}\n")
    with pytest.raises(InputError, match=r"evil\.yaml is an address; download it"):
        load_config(tmp_path / "config.yaml")


def test_bases_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: [a.yaml]\n")
    with pytest.raises(InputError, match=r"leads back .*a\.yaml -> .*b\.yaml -> .*a\.yaml$"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("VERSION: 2\n")
    load_config(tmp_path / "b.yaml")


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("VERSION: 2\n")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("_BASE_: base.yaml\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\n")
    load_config(tmp_path / "c.yaml")


BILLION = "a0: &a0 [1, 2]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "unfolds to more than 100000 values"),
        ("a: &a [*a]\n", "unfolds to more than"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper than 50"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 50"),
        ("# " + "x" * 1_000_001, "has 1000003 bytes, and a config at most 1000000"),
    ],
    ids=["aliases", "an alias of itself", "nested", "nested very deep", "large"],
)
def test_a_yaml_bomb_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert len(BILLION) < 700
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "config.yaml")


def test_a_section_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    text = "SOLVER:\n  BASE_LR: 0.1\nMODEL:\n  MASK_ON: True\nSOLVER:\n  MAX_ITER: 10\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="line 5: SOLVER stands here a second time"):
        load_config(tmp_path / "config.yaml")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "config.yaml").write_text("_BASE_: pipe.yaml\n")
    for name in ("pipe.yaml", "config.yaml"):
        with pytest.raises(InputError, match=r"pipe\.yaml is no file, but a folder, device, pipe"):
            load_config(tmp_path / name)
