"""tools/train_net.py end to end, on a tiny set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from support.programs import ROOT, TINY, folder_flags, run_program

from gn_det import InputError
from gn_det.config import load_config
from gn_det.engine.predictor import Predictor

CONFIG = ["--config-file", ROOT / "configs/small/quickstart.yaml"]
TRAIN_NET = "tools/train_net.py"


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of two steps as a user starts it: its folder, stdout and stderr."""
    output = tmp_path_factory.mktemp("run") / "output"
    done = run_program(
        TRAIN_NET, *CONFIG, *folder_flags(shapes), "OUTPUT_DIR", output, *TINY,
        "SOLVER.CHECKPOINT_PERIOD", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, done.stdout, done.stderr


def test_a_run_leaves_checkpoints_metrics_events_config_and_results(finished: tuple) -> None:
    output, _, _ = finished
    names = {path.name for path in output.iterdir()}
    assert {
        "model_0000000.pth", "model_final.pth", "last_checkpoint", "metrics.json", "config.yaml",
        "results.json", "environment.txt", "log.txt", "inference",
    } <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {"bbox", "segm"} == set(json.loads((output / "results.json").read_text()))


def test_the_output_is_not_drowned_in_warnings(finished: tuple) -> None:
    _, stdout, stderr = finished
    for nuisance in ("pkg_resources", "torch.jit", "meshgrid", "Warning"):
        assert nuisance not in stdout + stderr


def test_running_on_the_cpu_is_said_in_one_line(finished: tuple) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which the run takes")
    lines = [line for line in finished[1].splitlines() if "Running on the CPU" in line]
    assert len(lines) == 1


def test_the_classes_of_the_folder_reach_the_config(finished: tuple) -> None:
    cfg = load_config(finished[0] / "config.yaml")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.DATASETS.CATEGORIES == [[1, "circle"], [2, "triangle"], [3, "square"]]
    assert list(cfg.DATASETS.TRAIN) == ["custom_train"]


def test_the_reloaded_weights_predict_what_the_run_evaluated(finished: tuple, shapes: Path) -> None:
    cfg = load_config(finished[0] / "config.yaml")
    cfg.MODEL.WEIGHTS = str(finished[0] / "model_final.pth")
    results = json.loads((finished[0] / "inference/coco_instances_results.json").read_text())
    expected = [r["score"] for r in results if r["image_id"] == 7]
    image = read_image(str(shapes / "images" / "000007.jpg"), format="BGR")
    scores = Predictor(cfg)(image)["instances"].scores.tolist()
    assert len(expected) > 0 and scores == pytest.approx(expected, rel=1e-4)


def test_evaluating_again_gives_the_same_results_and_leaves_the_run_alone(
    finished: tuple, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _, _ = finished
    kept = {
        path: path.read_bytes()
        for path in output.rglob("*")
        if path.suffix in {".json", ".txt", ".yaml"}
    }
    assert len(kept) >= 4
    call_main(
        TRAIN_NET, "--config-file", output / "config.yaml", "--eval-only",
        "MODEL.WEIGHTS", output / "model_final.pth", "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert "Evaluation results for custom_val" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in kept.items())
    predicted = "inference/coco_instances_results.json"
    again = json.loads((output / "evaluation" / predicted).read_text())
    assert [r["score"] for r in again] == pytest.approx(
        [r["score"] for r in json.loads(kept[output / predicted])], rel=1e-4
    )


def test_augmentation_in_testing_has_metrics_of_its_own(
    finished: tuple, call_main: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["MODEL.WEIGHTS", finished[0] / "model_final.pth", "DATALOADER.NUM_WORKERS", 0]
    options = [*weights, "OUTPUT_DIR", tmp_path, "TEST.AUG.ENABLED", True]
    config = ["--config-file", finished[0] / "config.yaml", "--eval-only"]
    call_main(TRAIN_NET, *config, *options, "TEST.AUG.MIN_SIZES", "(64, 128)")
    printed = capsys.readouterr().out
    plain, _, augmented = printed.partition("with TEST.AUG")
    assert "copypaste: Task: segm" in plain and "copypaste: Task: segm" in augmented
    plain, augmented = (
        json.loads((tmp_path / f"evaluation/{name}/coco_instances_results.json").read_text())
        for name in ("inference", "inference_TTA")
    )
    assert augmented and plain != augmented


def test_augmentation_that_a_model_cannot_have_is_refused_before_it_trains(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    dense = ["MODEL.META_ARCHITECTURE", "GNProposalNetwork", "TEST.AUG.ENABLED", True]
    arguments = [*CONFIG, *folder_flags(shapes), *TINY, *dense, "OUTPUT_DIR", tmp_path / "r"]
    with pytest.raises(InputError, match="the augmentation in testing cannot be built"):
        call_main(TRAIN_NET, *arguments)
    assert not [*(tmp_path / "r").rglob("*.pth")]


@pytest.mark.slow
def test_a_training_ends_with_augmentation_in_testing(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    augmented = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)"]
    call_main(
        TRAIN_NET, *CONFIG, *folder_flags(shapes), *TINY, *augmented, "OUTPUT_DIR", tmp_path / "r"
    )
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert {"bbox", "segm", "bbox_TTA", "segm_TTA"} == results.keys()


def test_a_finished_run_is_not_overwritten(finished: tuple, call_main: Callable) -> None:
    config = ["--config-file", finished[0] / "config.yaml"]
    with pytest.raises(InputError, match="holds a run already; --resume"):
        call_main(TRAIN_NET, *config)


def test_resuming_goes_on_where_the_run_stopped(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    flags = [*CONFIG, *folder_flags(shapes)]
    options = ["OUTPUT_DIR", tmp_path / "run", *TINY]
    call_main(TRAIN_NET, *flags, *options)
    call_main(TRAIN_NET, *flags, "--resume", *options, "SOLVER.MAX_ITER", 4)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines if "total_loss" in line] == [1, 3]
    checkpoint = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3
    # A run that is finished has nothing to train, and is evaluated again.
    call_main(TRAIN_NET, *flags, "--resume", *options, "SOLVER.MAX_ITER", 4)


def test_training_without_a_held_out_split(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    call_main(TRAIN_NET, *CONFIG, *folder_flags(shapes)[:3], "OUTPUT_DIR", tmp_path / "run", *TINY)
    assert (tmp_path / "run" / "model_final.pth").exists()
    assert not (tmp_path / "run" / "results.json").exists()


def test_objects_with_rle_masks_train(
    edit_shapes: Callable, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def to_rle(dataset: dict) -> None:
        sizes = {i["id"]: [i["height"], i["width"]] for i in dataset["images"]}
        for annotation in dataset["annotations"]:
            height, width = sizes[annotation["image_id"]]
            counts = [height * 20 + 20, 30, height * width - height * 20 - 50]
            annotation["segmentation"] = {"size": [height, width], "counts": counts}

    flags = folder_flags(edit_shapes(to_rle))[:3]
    call_main(TRAIN_NET, *CONFIG, *flags, "OUTPUT_DIR", tmp_path / "run", *TINY)
    assert "INPUT.MASK_FORMAT is now bitmask" in capsys.readouterr().out


def test_bad_images_are_left_out_when_asked(
    edit_shapes: Callable, tmp_path: Path, call_main: Callable
) -> None:
    folder = edit_shapes(lambda d: None)
    (folder / "images" / "000002.jpg").unlink()  # of the training split
    (folder / "images" / "000008.jpg").unlink()  # of the held-out split
    options = ["OUTPUT_DIR", tmp_path / "run", *TINY]
    with pytest.raises(InputError, match=r"1 of 6 images are missing in .*images: 000002\.jpg"):
        call_main(TRAIN_NET, *CONFIG, *folder_flags(folder), *options)
    assert not (tmp_path / "run").exists()
    call_main(TRAIN_NET, *CONFIG, *folder_flags(folder), "--skip-bad-images", *options)
    used = {}
    for split in ("train", "val"):
        path = tmp_path / "run" / "datasets" / f"custom_{split}.json"
        used[split] = [image["id"] for image in json.loads(path.read_text())["images"]]
    assert used == {"train": [1, 3, 4, 5, 6], "val": [7, 9]}
    predictions = tmp_path / "run" / "inference" / "coco_instances_results.json"
    assert {p["image_id"] for p in json.loads(predictions.read_text())} == {7, 9}


@pytest.mark.slow
def test_a_mended_set_is_trained_evaluated_and_resumed_as_the_sound_one_is(
    shapes: Path, edit_shapes: Callable, tmp_path: Path, call_main: Callable
) -> None:
    def spoil(dataset: dict) -> None:
        """As several tools would write it: nothing of what it says is lost."""
        for number, annotation in enumerate(dataset["annotations"]):
            category, image = annotation["category_id"], annotation["image_id"]
            annotation.update(id=number, category_id=str(category), image_id=str(image))
            annotation["bbox"] = [str(value) for value in annotation["bbox"]]
            annotation["iscrowd"] = bool(annotation["iscrowd"])
        for image in dataset["images"]:
            image.update(id=str(image["id"]), width=-1, file_name="x\\" + image["file_name"])

    edit_shapes(spoil, split="val")
    folder = edit_shapes(spoil)
    written = {split: (folder / f"{split}.json").read_bytes() for split in ("train", "val")}

    def forget_sets() -> None:
        for name in ("custom_train", "custom_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    results = []
    for name, source in (("sound", shapes), ("spoilt", folder)):
        options = ["OUTPUT_DIR", tmp_path / name, *TINY, "SEED", 0]
        call_main(TRAIN_NET, *CONFIG, *folder_flags(source), *options)
        forget_sets()
        config = ["--config-file", tmp_path / name / "config.yaml"]
        call_main(TRAIN_NET, *config, "--resume", "SOLVER.MAX_ITER", 3)
        forget_sets()
        predictions = tmp_path / name / "inference" / "coco_instances_results.json"
        results.append([(tmp_path / name / "results.json").read_text(), predictions.read_text()])
    assert results[0] == results[1]
    for split, content in written.items():
        assert (folder / f"{split}.json").read_bytes() == content
        copy = json.loads((tmp_path / "spoilt" / "datasets" / f"custom_{split}.json").read_text())
        sound = json.loads((shapes / f"{split}.json").read_text())
        assert [a["id"] for a in copy["annotations"]] == [a["id"] for a in sound["annotations"]]


@pytest.mark.slow
def test_keypoints_of_ones_own_train_and_are_evaluated(
    edit_shapes: Callable, tmp_path: Path, call_main: Callable
) -> None:
    def to_keypoints(dataset: dict) -> None:
        for category in dataset["categories"]:
            category["keypoints"] = ["l", "r", "top"]
        for annotation in dataset["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["keypoints"] = [x, y, 2, x + w - 1, y, 2, x + w / 2, y + h - 1, 1]
            annotation.pop("segmentation")

    edit_shapes(to_keypoints, split="val")
    flags = [*CONFIG, *folder_flags(edit_shapes(to_keypoints))]
    options = ["OUTPUT_DIR", tmp_path / "run", *TINY, "MODEL.MASK_ON", "False"]
    options += ["MODEL.KEYPOINT_ON", "True"]
    with pytest.raises(InputError, match=r"3 keypoints, and TEST\.KEYPOINT_OKS_SIGMAS 0 numbers"):
        call_main(TRAIN_NET, *flags, *options)
    call_main(TRAIN_NET, *flags, *options, "TEST.KEYPOINT_OKS_SIGMAS", "(0.05, 0.05, 0.05)")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"bbox", "keypoints"} == set(results)
    cfg = load_config(tmp_path / "run" / "config.yaml")
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.WEIGHTS", "nowhere.pth"], r"weights nowhere\.pth do not exist"),
        (["MODEL.RESNET.DEPTH", "18"], r"did you mean MODEL\.RESNETS\.DEPTH"),
        (["MODEL.DEVICE", "cuda:99"], "cuda:99"),
        (["SOLVER.IMS_PER_BATCH", "0"], r"IMS_PER_BATCH is 0, and has to be at least 1"),
        (["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu"], "mixed precision needs a GPU"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    shapes: Path, tmp_path: Path, call_main: Callable, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call_main(
            TRAIN_NET, *CONFIG, *folder_flags(shapes), "OUTPUT_DIR", tmp_path / "run", *options
        )
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_leave_nothing_behind(
    finished: tuple, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    wide = ["MODEL.FPN.OUT_CHANNELS", 32, *TINY]
    weights = ["MODEL.WEIGHTS", finished[0] / "model_final.pth"]
    with pytest.raises(InputError, match="does not fit the model: .* of another shape"):
        call_main(
            TRAIN_NET, *CONFIG, *folder_flags(shapes), "OUTPUT_DIR", tmp_path / "run",
            *weights, *wide,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_model_leaves_the_runs_config_alone(
    finished: tuple, shapes: Path, call_main: Callable
) -> None:
    before = (finished[0] / "config.yaml").read_bytes()
    with pytest.raises(InputError, match="OUT_CHANNELS is 64 in the run, 32 in"):
        call_main(
            TRAIN_NET, *CONFIG, *folder_flags(shapes), "--resume", "OUTPUT_DIR", finished[0],
            "MODEL.FPN.OUT_CHANNELS", 32, *TINY,
        )  # fmt: skip
    assert (finished[0] / "config.yaml").read_bytes() == before


def test_a_user_sees_one_line_and_status_2() -> None:
    done = run_program(TRAIN_NET, *CONFIG, "--train", "nowhere.json", ".")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "nowhere.json does not exist" in line


@pytest.mark.slow
def test_two_processes_train_on_the_cpu_over_gloo(shapes: Path, tmp_path: Path) -> None:
    done = run_program(
        TRAIN_NET, *CONFIG, *folder_flags(shapes), "--num-gpus", 2, "--dist-url", "auto",
        "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "run", *TINY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").exists()
    assert "Rank of current process" not in done.stdout
    assert (tmp_path / "run" / "log.txt.rank1").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["SEED"] == 0


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_start_from_scratch_with_frozen_layers_is_refused(
    flags: list[str], shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "run"
    overrides = ["OUTPUT_DIR", output, *TINY, "MODEL.BACKBONE.FREEZE_AT", "2"]
    with pytest.raises(InputError, match="FREEZE_AT 2 freezes random weights; set it to 0"):
        call_main(TRAIN_NET, *CONFIG, *folder_flags(shapes), *flags, *overrides)
    assert not output.exists()


def test_the_schedule_of_images_per_gpu_is_printed_and_kept(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    call_main(
        TRAIN_NET, *CONFIG, *folder_flags(shapes), "OUTPUT_DIR", output, *TINY,
        "SOLVER.IMS_PER_GPU", "1", "SOLVER.BASE_LR", "0.04",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"images per step +2 +1 = 1 x 1 GPUs", printed)
    cfg = load_config(output / "config.yaml")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_GPU) == (1, 0)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.02, 4)


@pytest.mark.slow
def test_an_error_in_two_processes_is_no_stack_trace_either(shapes: Path, tmp_path: Path) -> None:
    torch.save({"model": {"other": torch.ones(1)}}, tmp_path / "other.pth")
    done = run_program(
        TRAIN_NET, *CONFIG, *folder_flags(shapes), "--num-gpus", 2, "--dist-url", "auto",
        "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "run", *TINY,
        "MODEL.WEIGHTS", tmp_path / "other.pth",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert line.startswith("error: ") and "does not fit the model" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
