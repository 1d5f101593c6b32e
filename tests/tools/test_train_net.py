"""tools/train_net.py end to end, on a tiny set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, TINY, folder_flags, run_program

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


def test_the_trained_weights_predict_after_reloading(finished: tuple) -> None:
    cfg = load_config(finished[0] / "config.yaml", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"])
    cfg.MODEL.WEIGHTS = str(finished[0] / "model_final.pth")
    image = torch.randint(0, 255, (96, 128, 3), dtype=torch.uint8).numpy()
    first, second = (Predictor(cfg)(image)["instances"] for _ in range(2))
    assert len(first) > 0 and torch.equal(first.scores, second.scores)


def test_evaluating_again_gives_the_same_results_and_leaves_the_run_alone(
    finished: tuple, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _, _ = finished
    kept = {name: (output / name).read_bytes() for name in ("config.yaml", "results.json")}
    call_main(
        TRAIN_NET, "--config-file", output / "config.yaml", "--eval-only",
        "MODEL.WEIGHTS", output / "model_final.pth", "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    results = json.loads(kept["results.json"])
    assert f"{results['segm']['AP50']:.4f}" in capsys.readouterr().out
    assert all((output / name).read_bytes() == content for name, content in kept.items())


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
    with pytest.raises(InputError, match=r"1 of 6 images: 000002\.jpg .missing."):
        call_main(TRAIN_NET, *CONFIG, *folder_flags(folder), *options)
    assert not (tmp_path / "run").exists()
    call_main(TRAIN_NET, *CONFIG, *folder_flags(folder), "--skip-bad-images", *options)
    predictions = tmp_path / "run" / "inference" / "coco_instances_results.json"
    assert {p["image_id"] for p in json.loads(predictions.read_text())} <= {7, 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.WEIGHTS", "nowhere.pth"], r"weights nowhere\.pth do not exist"),
        (["MODEL.RESNET.DEPTH", "18"], r"did you mean MODEL\.RESNETS\.DEPTH"),
        (["MODEL.DEVICE", "cuda:99"], "cuda:99"),
        (["SOLVER.IMS_PER_BATCH", "0"], "0 images a step"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "nowhere.json", "."], "error: .*nowhere.json cannot be read"),
        (["OUTPUT_DIR", "/dev/null/run", "--train"], "error:|usage:"),
    ],
)
def test_a_user_sees_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = run_program(TRAIN_NET, *CONFIG, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


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


def test_an_error_in_two_processes_is_no_stack_trace_either(shapes: Path, tmp_path: Path) -> None:
    torch.save({"model": {"other": torch.ones(1)}}, tmp_path / "other.pth")
    done = run_program(
        TRAIN_NET, *CONFIG, *folder_flags(shapes), "--num-gpus", 2, "--dist-url", "auto",
        "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "run", *TINY,
        "MODEL.WEIGHTS", tmp_path / "other.pth",
    )  # fmt: skip
    assert done.returncode == 2
    assert "does not fit the model" in done.stderr
    assert "Traceback" not in done.stderr
