"""Draw what a trained model sees in images, folders, globs and videos."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from gn_det.engine.command import run_command
from gn_det.engine.launch import check_device
from gn_det.engine.predictor import Predictor, model_categories

import cv2
import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from tqdm import tqdm

from gn_det.checkpoint import check_weights_exist
from gn_det.checkpoint.checkpointer import last_checkpoint
from gn_det.config import load_config
from gn_det.data.pictures import problem_of, read_picture, read_suffixes
from gn_det.errors import InputError
from gn_det.files import check_regular_file, make_folder, whole_file, write_atomically
from gn_det.plots.overlay import draw_objects
from gn_det.text import printable, shortened

IMAGE_SUFFIXES = read_suffixes()
WRITTEN_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UNREADABLE = (OSError, InputError, cv2.error)
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


def main() -> int:
    args = parse_arguments()
    inputs = find_inputs(args.input)
    outputs = output_paths(inputs, args.output)
    cfg = load_demo_config(args)
    demo = Demo(Predictor(cfg), model_categories(cfg), cfg.INPUT.VALUE_RANGE)
    if args.json:
        if args.json.is_dir():
            raise InputError(f"--json {args.json} is a folder; name a file in it")
        if os.path.lexists(args.json):
            raise InputError(f"--json {args.json} exists; remove it, or name another file")
        make_folder(args.json.parent)
    make_folder(args.output)

    failures = []
    ids = image_ids(inputs)
    for path, output, image_id in tqdm(list(zip(inputs, outputs, ids, strict=True)), unit="file"):
        try:
            demo.run(path, output, image_id)
        except UNREADABLE as error:
            failures.append(f"{printable(path)}: {problem_of(path, error)}")
    print(f"{len(inputs) - len(failures)} of {len(inputs)} inputs drawn to {args.output}")
    if args.json:
        write_atomically(args.json, json.dumps(demo.results))
        print(f"{len(demo.results)} detections written to {args.json}")
    if failures:
        print("not drawn:\n  " + "\n  ".join(failures), file=sys.stderr)
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", type=Path, required=True, help="config.yaml of a run, or another config")
    add("--weights", help="default: the last checkpoint beside the config file, else MODEL.WEIGHTS")
    add("--input", nargs="+", required=True, help="files, folders, globs and videos")
    add("--output", type=Path, required=True, help="folder for the overlaid images and videos")
    add("--json", type=Path, metavar="FILE", help="also write the detections as COCO results")
    add("--confidence-threshold", type=float, default=0.5, help="default: %(default)s")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides, KEY VALUE ...")
    args = parser.parse_args()
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold {args.confidence_threshold} is not in 0 to 1")
    return args


def load_demo_config(args: argparse.Namespace) -> Any:
    """The config with weights and threshold set; InputError where there are no weights."""
    cfg = load_config(args.config_file, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    elif "MODEL.WEIGHTS" not in args.opts and (last := last_checkpoint(args.config_file.parent)):
        cfg.MODEL.WEIGHTS = str(last)
    elif not cfg.MODEL.WEIGHTS:
        raise InputError(f"{args.config_file} names no weights; give them with --weights")
    check_weights_exist(cfg.MODEL.WEIGHTS)
    print(f"weights: {cfg.MODEL.WEIGHTS}")
    check_device(cfg.MODEL.DEVICE, "--opts MODEL.DEVICE cpu")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    return cfg


def find_inputs(patterns: list[str]) -> list[Path]:
    """Every file that --input names: a folder stands for the images and videos in it."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
            there = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            files = [p for p in there if p.suffix.lower() in suffixes]
            others = [p.name for p in there if p.suffix.lower() not in suffixes]
            if others:
                print(f"{path}: {len(others)} are no images or videos: {shortened(others, 5)}")
        elif path.exists():
            check_regular_file(path, "--input")
            files = [path]
        else:
            files = sorted(Path(p) for p in glob(pattern, recursive=True) if Path(p).is_file())
        if not files:
            raise InputError(f"--input {pattern}: no such file, or no image or video in it")
        found += files
    return list(dict.fromkeys(found))


def output_paths(inputs: list[Path], folder: Path) -> list[Path]:
    """Where each input's drawing goes; no two to one file, none over an input."""
    outputs = []
    for path in inputs:
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            suffix = ".mp4"
        elif suffix not in WRITTEN_SUFFIXES:
            suffix = ".png"
        outputs.append(folder / f"{path.stem}{suffix}")
    # Files that differ in their suffix alone keep it.
    counts = Counter(outputs)
    outputs = [
        output if counts[output] == 1 else folder / f"{path.name}{output.suffix}"
        for path, output in zip(inputs, outputs, strict=True)
    ]
    taken: dict[Path, Path] = {}
    sources = {path.resolve() for path in inputs}
    for path, output in zip(inputs, outputs, strict=True):
        if output.resolve() in sources:
            raise InputError(f"drawing {path} to {output} would overwrite an input")
        if output in taken:
            raise InputError(f"{taken[output]} and {path} would both be drawn to {output}")
        taken[output] = path
    return outputs


def image_ids(inputs: list[Path]) -> list[int]:
    """COCO image ids: the numbers that all files are named by, each once, else 1, 2, ..."""
    ids = [int(path.stem) for path in inputs if path.stem.isdecimal()]
    return ids if len({*ids}) == len(inputs) else list(range(1, len(inputs) + 1))


class Demo:
    """Runs a predictor over files and collects its detections in COCO's results format."""

    def __init__(
        self,
        predictor: Predictor,
        categories: list[tuple[int, str]],
        value_range: Sequence[float] = (),
    ) -> None:
        self.predictor = predictor
        self.categories = categories
        self.value_range = value_range
        self.results: list[dict[str, Any]] = []

    def run(self, path: Path, output: Path, image_id: int) -> None:
        """Draw one image or video; one of UNREADABLE if it cannot be read or written."""
        where = {"image_id": image_id, "file_name": str(path)}
        if path.suffix.lower() in VIDEO_SUFFIXES:
            self._run_video(path, output, where)
        else:
            drawn = self._draw(read_picture(path, "BGR", self.value_range), where)
            encoded = cv2.imencode(output.suffix, drawn)[1]
            with whole_file(output) as file:
                file.write(encoded.tobytes())

    def _run_video(self, path: Path, output: Path, where: dict[str, Any]) -> None:
        video = cv2.VideoCapture(str(path))
        fps = video.get(cv2.CAP_PROP_FPS) or 25.0
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) or None
        writer = None
        partial = output.with_name(f"partial-{output.name}")
        frames = tqdm(
            _frames(video), total=total, desc=printable(path.name), unit="frame", leave=False
        )
        try:
            for number, frame in enumerate(frames):
                drawn = self._draw(frame, {**where, "frame": number})
                if writer is None:
                    height, width = drawn.shape[:2]
                    codec = cv2.VideoWriter.fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(partial), codec, fps, (width, height))
                    if not writer.isOpened():
                        raise OSError(f"{output} cannot be written")
                writer.write(drawn)
            if writer is None:
                raise OSError("not a video that can be read")
            writer.release()
            os.replace(partial, output)
        finally:
            partial.unlink(missing_ok=True)
        if total and number + 1 < 0.95 * total:  # the number of some formats is an estimate
            raise OSError(f"damaged: {number + 1} of {total} frames are drawn")

    def _draw(self, image: np.ndarray, where: dict[str, Any]) -> np.ndarray:
        """BGR in, BGR out."""
        predicted = self.predictor(image)
        if "instances" not in predicted:
            raise InputError(
                f"the demo draws instances, and this model predicts {', '.join(predicted)} alone"
            )
        instances = predicted["instances"].to("cpu")
        results = instances_to_coco_json(instances, where["image_id"])
        for result in results:
            result.update(where, category_id=self.categories[result["category_id"]][0])
        self.results += results
        return draw_objects(image[:, :, ::-1], results, dict(self.categories))[:, :, ::-1]


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        ok, frame = video.read()
        if not ok:
            return
        yield frame


if __name__ == "__main__":
    run_command(main)
