"""A YAML config cannot run code, unless it lies inside Detectron2."""

from __future__ import annotations

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
