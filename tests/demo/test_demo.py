"""demo/demo.py on pictures, folders and videos."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from support.programs import ROOT, load_program, run_program

from gn_det import InputError, get_config
from gn_det.config import load_config
from gn_det.engine.predictor import model_categories

DEMO = "demo/demo.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves for the demo: config.yaml and model_final.pth."""
    folder = tmp_path_factory.mktemp("run")
    cfg = get_config("small/quickstart.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.DATASETS.CATEGORIES = [[11, "circle"], [12, "triangle"], [13, "square"]]
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture
def demo(run: Path, call_main: Callable) -> Callable[..., int]:
    """Call the demo at a threshold that random weights reach."""

    def call(*args: object) -> int:
        config = ["--config-file", run / "config.yaml", "--confidence-threshold", 0.2]
        return call_main(DEMO, *config, *args)

    return call


@pytest.fixture
def pictures(shapes: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("000001.jpg", "000002.jpg"):
        shutil.copy(shapes / "images" / name, folder)
    return folder


def write_video(path: Path, frames: int = 3) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (96, 64))
    for level in range(frames):
        writer.write(np.full((64, 96, 3), 50 * level, np.uint8))
    writer.release()
    return path


def test_a_folder_is_drawn_and_its_detections_are_coco_results(
    demo: Callable, pictures: Path, shapes: Path, tmp_path: Path
) -> None:
    status = demo(
        "--input", pictures, "--output", tmp_path / "out", "--json", tmp_path / "found.json"
    )
    assert status == 0
    drawn = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in drawn] == ["000001.jpg", "000002.jpg"]
    assert min(cv2.imread(str(drawn[0])).shape[:2]) == 480  # enlarged, so labels can be read

    results = json.loads((tmp_path / "found.json").read_text())
    assert results and {r["category_id"] for r in results} <= {11, 12, 13}
    assert {r["image_id"] for r in results} <= {1, 2}  # the numbers in the file names
    assert all(r["score"] >= 0.2 for r in results)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(shapes / "train.json").loadRes(str(tmp_path / "found.json"))
    assert len(loaded.anns) == len(results)


def test_detections_cover_the_picture_that_they_are_drawn_on(
    demo: Callable, pictures: Path, tmp_path: Path
) -> None:
    demo("--input", pictures / "000001.jpg", "--output", tmp_path / "out",
         "--json", tmp_path / "found.json")  # fmt: skip
    before = cv2.resize(cv2.imread(str(pictures / "000001.jpg")), (480, 480))
    after = cv2.resize(cv2.imread(str(tmp_path / "out" / "000001.jpg")), (480, 480))
    assert np.abs(before.astype(int) - after).mean() > 1


def test_globs_and_a_video_are_drawn(demo: Callable, pictures: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "film.mp4")
    status = demo("--input", pictures / "*1.jpg", video, "--output", tmp_path / "out")
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000001.jpg", "film.mp4"]
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    frames = [drawn.read()[0] for _ in range(4)]
    assert frames == [True, True, True, False]
    assert drawn.get(cv2.CAP_PROP_FPS) == 10


def test_what_is_no_image_is_listed_at_the_end_and_the_rest_is_drawn(
    demo: Callable, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "000000.jpg").write_text("no picture")
    content = (pictures / "000001.jpg").read_bytes()
    (pictures / "000001.jpg").write_bytes(content[: len(content) // 2])
    (pictures / "film.mp4").write_text("no film")
    status = demo("--input", pictures, pictures / "film.mp4", "--output", tmp_path / "out")
    assert status == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["000002.jpg"]
    output = capsys.readouterr()
    assert "1 of 4 inputs drawn" in output.out
    listed = output.err[output.err.index("not drawn") :]
    assert all(name in listed for name in ("000000.jpg", "000001.jpg", "film.mp4"))
    assert "000002.jpg" not in listed


def test_pictures_without_detections_are_drawn_too(
    demo: Callable, pictures: Path, tmp_path: Path
) -> None:
    status = demo(
        "--input", pictures, "--output", tmp_path / "out", "--json", tmp_path / "found.json",
        "--confidence-threshold", 1,
    )  # fmt: skip
    assert status == 0 and len(list((tmp_path / "out").iterdir())) == 2
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_image_ids_are_the_numbers_in_the_names_or_count_the_files() -> None:
    image_ids = load_program(DEMO).image_ids
    assert image_ids([Path("a/000007.jpg"), Path("b/12.png")]) == [7, 12]
    assert image_ids([Path("a/000007.jpg"), Path("a/cat.jpg")]) == [1, 2]
    assert image_ids([Path("a/1.jpg"), Path("a/1.png"), Path("a/01.bmp")]) == [1, 2, 3]


def test_grey_and_transparent_pictures_are_drawn(demo: Callable, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "grey.png"), np.zeros((64, 64), np.uint8))
    cv2.imwrite(str(tmp_path / "in" / "rgba.png"), np.zeros((64, 64, 4), np.uint8))
    assert demo("--input", tmp_path / "in", "--output", tmp_path / "out") == 0


def test_inputs_are_never_overwritten(demo: Callable, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would overwrite an input"):
        demo("--input", pictures, "--output", pictures)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(pictures / "000001.jpg", other)
    with pytest.raises(InputError, match="would both be drawn to"):
        demo("--input", pictures, other, "--output", tmp_path / "out")


def test_inputs_that_match_nothing_are_an_error(demo: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for missing in ("nowhere.jpg", "nowhere/*.jpg", tmp_path / "empty"):
        with pytest.raises(InputError, match="no such file, or no image"):
            demo("--input", missing, "--output", tmp_path / "out")


def test_weights_that_are_missing_or_do_not_fit_are_an_error(
    demo: Callable, run: Path, pictures: Path, tmp_path: Path
) -> None:
    rest = ["--input", pictures, "--output", tmp_path / "out"]
    with pytest.raises(InputError, match=r"nowhere\.pth do not exist"):
        demo("--weights", "nowhere.pth", *rest)
    with pytest.raises(InputError, match="does not fit the model.*of another shape"):
        demo(*rest, "--opts", "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_drawn_with_its_last_checkpoint(
    run: Path, pictures: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    cfg = (run / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(
        cfg.replace("WEIGHTS: ''", f"WEIGHTS: {run}/model_final.pth", 1)
    )
    for name in ("model_0000001.pth", "model_0000003.pth"):
        shutil.copy(run / "model_final.pth", unfinished / name)
    (unfinished / "last_checkpoint").write_text("model_0000003.pth")
    config = ["--config-file", unfinished / "config.yaml"]
    call_main(DEMO, *config, "--input", pictures, "--output", tmp_path / "out")
    assert f"weights: {unfinished}/model_0000003.pth" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "number", "first"),
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", 80], 80, "person"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 3], 3, "1"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 500], 500, "1"),
        (["MODEL.META_ARCHITECTURE", "GNRetinaNet", "MODEL.RETINANET.NUM_CLASSES", 30], 30, "1"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 7, "DATASETS.TEST", ()], 7, "1"),
    ],
)
def test_names_are_of_as_many_classes_as_the_model_has(
    options: list, number: int, first: str
) -> None:
    cfg = get_config("small/quickstart.yaml")
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.merge_from_list(options)
    categories = model_categories(cfg)
    assert len(categories) == number and categories[0] == (1, first)


def test_a_model_that_predicts_no_instances_is_told(
    run: Path, pictures: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    cfg = load_config(run / "config.yaml", ["MODEL.META_ARCHITECTURE", "GNProposalNetwork"])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "rpn.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = [
        "--input",
        pictures,
        "--output",
        tmp_path / "out",
        "--weights",
        tmp_path / "rpn.pth",
    ]
    assert call_main(DEMO, "--config-file", tmp_path / "config.yaml", *arguments) == 1
    assert "draws instances, and this model predicts proposals alone" in capsys.readouterr().err


def test_a_lazy_config_is_told_from_a_yaml_one(
    pictures: Path, tmp_path: Path, call_main: Callable
) -> None:
    (tmp_path / "config.yaml").write_text("model:\n  _target_: detectron2.modeling.RetinaNet\n")
    for config in (tmp_path / "config.yaml", ROOT / "configs/small/quickstart.py"):
        with pytest.raises(InputError, match="is no YAML config, but a LazyConfig"):
            call_main(DEMO, "--config-file", config, "--input", pictures, "--output", tmp_path)


def test_weights_of_the_overrides_come_before_those_beside_the_config(
    demo: Callable, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth do not exist"):
        demo(
            "--input", pictures, "--output", tmp_path / "out",
            "--opts", "MODEL.WEIGHTS", "nowhere.pth",
        )  # fmt: skip


def test_a_gpu_that_is_not_there_is_told(demo: Callable, pictures: Path, tmp_path: Path) -> None:
    rest = ["--input", pictures, "--output", tmp_path / "out"]
    with pytest.raises(InputError, match=r"cuda:99 .* MODEL\.DEVICE cpu"):
        demo(*rest, "--opts", "MODEL.DEVICE", "cuda:99")


def test_the_folder_of_the_json_file_is_made_before_the_work(
    demo: Callable, pictures: Path, tmp_path: Path
) -> None:
    rest = ["--input", pictures, "--output", tmp_path / "out"]
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        demo(*rest, "--json", tmp_path)
    assert demo(*rest, "--json", tmp_path / "new" / "found.json") == 0
    there = (tmp_path / "new" / "found.json").read_text()
    with pytest.raises(
        InputError, match=r"--json .*found\.json exists; remove it, or name another"
    ):
        demo(*rest, "--json", tmp_path / "new" / "found.json")
    assert (tmp_path / "new" / "found.json").read_text() == there
    with pytest.raises(InputError, match="cannot be written"):
        demo(*rest, "--json", pictures / "000001.jpg" / "found.json")


def test_a_config_without_weights_asks_for_them(
    call_main: Callable, pictures: Path, tmp_path: Path
) -> None:
    config = ROOT / "configs/small/quickstart.yaml"
    with pytest.raises(InputError, match="names no weights; give them with --weights"):
        call_main(DEMO, "--config-file", config, "--input", pictures, "--output", tmp_path / "out")


def test_a_user_sees_progress_and_where_the_pictures_are(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    done = run_program(
        DEMO, "--config-file", run / "config.yaml", "--input", pictures,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr and "Warning" not in done.stderr
    assert f"2 of 2 inputs drawn to {tmp_path / 'out'}" in done.stdout
