"""Check and time everything on this machine's GPU, and write one report.

The tests of the kernels, every form of group_norm against float64, times beside other
implementations, gaps between launches, training steps of Mask R-CNN, and a short training. A figure
whose check fails is not reported. What the environment lacks is left out, and said so.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gn_det.errors import InputError
from gn_det.files import make_folder
from gn_det.ops import group_norm
from gn_det.ops.form import FORMS
from gn_det.studies.gpu.environment import environment
from gn_det.studies.gpu.launch_gaps import gaps_in
from gn_det.studies.gpu.report import has_failed, write_plots, write_report
from gn_det.studies.gpu.section import LeftOut, Section
from gn_det.studies.kernels import report as kernel_report
from gn_det.studies.kernels.estimate import card_of, estimate_rows

ROOT = Path(__file__).parents[1]
GRACE = 10  # seconds for an interrupted command to write what it has


class Extent(NamedTuple):
    """How much is done; the tests do less.

    Attributes:
        checked: shapes on which every form, layout and dtype is held to float64.
        timed: shapes that are timed.
        variants: dtypes and layouts in which they are.
        config: of the training steps.
        batches: of a step, images and their (height, width).
        rounds: that steps take turns.
        iterations: of the quickstart.
        quickstart_images: that it trains on.
    """

    checked: list[kernel_report.Case]
    timed: list[kernel_report.Case]
    variants: list[tuple[str, str]]
    config: str
    batches: tuple[tuple[int, tuple[int, int]], ...]
    rounds: int
    iterations: int
    quickstart_images: int


TIMED = ("stem", "res2 conv3", "res4 conv3", "FPN, RPN P2", "FPN, RPN P5", "box head", "mask head")
FULL = Extent(
    checked=[
        kernel_report.Case("one pass", (2, 96, 9, 11)),
        kernel_report.Case("split", (1, 64, 61, 67)),
    ],
    timed=[case for case in kernel_report.mask_rcnn_cases(1) if case.name in TIMED],
    variants=[("bf16", "contiguous"), ("bf16", "channels_last"), ("fp32", "contiguous")],
    config="coco/mask_rcnn_R_50_FPN_gn_1x.yaml",
    # The last leaves the GPU little to do: its step takes as long as the host.
    batches=((1, (800, 1333)), (2, (800, 1333)), (1, (160, 160))),
    rounds=10,
    iterations=200,
    quickstart_images=200,
)


def main() -> int:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise InputError(
            f"PyTorch {torch.__version__} sees no GPU, and everything here runs on one; "
            "make test-kernels runs the kernels' tests in Triton's interpreter"
        )
    make_folder(args.output)
    os.environ["GN_DET_BACKEND"] = "triton"  # the kernels, or a fault
    return check(torch.device("cuda", torch.cuda.current_device()), args.output, FULL)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of report.md, report.json and plots"
    )
    return parser.parse_args()


def check(device: torch.device, output: Path, extent: Extent) -> int:
    """Do all sections, the report written anew after each; the exit status, 1 if a check failed."""
    facts = environment(device)
    sections: dict[str, Section] = {}
    for name, (title, fill, budget) in SECTIONS.items():
        print(f"{title} ...", flush=True)
        section = sections[name] = Section(title, budget)
        torch.manual_seed(0)
        fill(section, device, output, extent)
        if importlib.util.find_spec("matplotlib"):
            write_plots(output, sections)
        write_report(output, facts, sections)
        for fault in section.faults:
            print(f"  failed: {fault}", flush=True)
        for reason in section.left_out:
            print(f"  left out: {reason}", flush=True)
    print(f"The report is {output / 'report.md'}.")
    return int(has_failed(sections))


def kernel_tests(section: Section, device: torch.device, output: Path, extent: Extent) -> None:
    section.check("tests/ops/kernels", partial(run_kernel_tests, output, section.budget))


def run_kernel_tests(output: Path, seconds: float) -> dict[str, Any]:
    """Counts of the tests of the kernels, in a process of their own."""
    need("pytest", "hypothesis")
    folder = ROOT / "tests/ops/kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # What the other tests share needs Detectron2.
    command += [f"--confcutdir={folder}", str(folder)]
    if not installed("detectron2"):
        command.append(f"--ignore={folder / 'test_fused_models.py'}")
    if installed("xdist"):
        command += ["--numprocesses", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    log = output / "kernel_tests.txt"
    over = None
    try:
        done = run(command, log, seconds, {"TRITON_INTERPRET": "0"})
    except LeftOut as late:
        over, done = late, 0
    lines = log.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failed or done:
        raise RuntimeError("; ".join(failed[:3]) or f"pytest ended with status {done}")
    if over:
        raise over
    return {"tests": lines[-1].strip("= ")}


def exactness(section: Section, device: torch.device, output: Path, extent: Extent) -> None:
    for case, form, dtype, layout in itertools.product(
        extent.checked, FORMS, kernel_report.CHECKED_DTYPES, kernel_report.LAYOUTS
    ):
        measure = partial(kernel_report.check_row, case, form, dtype, layout, device.type)
        section.check(f"{form}, {case.name}, {dtype}, {layout}", measure)


def times(section: Section, device: torch.device, output: Path, extent: Extent) -> None:
    card = card_of(environment(device).get("card", ""))
    for (dtype, layout), case in itertools.product(extent.variants, extent.timed):
        measure = partial(time_row, device, card, case, "GN+ReLU", dtype, layout)
        section.check(f"{case.name}, {dtype}, {layout}", measure)


def time_row(
    device: torch.device,
    card: str | None,
    case: kernel_report.Case,
    form: str,
    dtype: str,
    layout: str,
) -> dict[str, Any]:
    """Times of one case, and ours over the estimate where the card is one that has one."""
    row = kernel_report.timing_row(case, form, dtype, layout, device.type)
    if card:
        (estimated,) = estimate_rows([case], form, dtype, layout, card)
        for direction in ("forward", "backward"):
            microseconds = 1000 * row[f"ours {direction} ms"]
            row[f"{direction} / estimate"] = microseconds / estimated[f"{direction} µs"]
    return row


def gaps(section: Section, device: torch.device, output: Path, extent: Extent) -> None:
    """Forward and backward of the smallest timed shape, where launches cost more than bytes."""
    case = min(extent.timed, key=lambda case: math.prod(case.shape))
    x = torch.randn(case.shape, device=device, requires_grad=True)
    weight, bias = (torch.randn(case.shape[1], device=device, requires_grad=True) for _ in "γβ")
    dy = torch.randn_like(x)

    def step(norm: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(norm(), (x, weight, bias), dy)

    groups = kernel_report.NUM_GROUPS
    steps = {
        "ours": partial(step, lambda: group_norm(x, groups, weight, bias, activation="relu")),
        "ATen": partial(
            step, lambda: torch.relu(torch.nn.functional.group_norm(x, groups, weight, bias))
        ),
    }
    for name, function in steps.items():
        section.check(f"{name}, {case.name}", partial(gap_row, name, function))
    section.check(f"a CUDA graph, {case.name}", partial(graph_row, steps["ours"]))


def gap_row(name: str, function: Callable[[], Any]) -> dict[str, Any]:
    for _ in range(5):
        function()
    return {
        "implementation": name, "host µs": host_microseconds(function), **gaps_in(function)
    }  # fmt: skip


def host_microseconds(function: Callable[[], Any], calls: int = 100) -> float:
    """What a call takes the host, which waits for nothing: few enough to queue."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * seconds / calls


def graph_row(function: Callable[[], tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """The same calls, captured once and replayed.

    Raises:
        ArithmeticError: a replay gives other values than a call.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = function()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    if not all(map(torch.equal, captured, function())):
        raise ArithmeticError("a replayed graph gives other gradients than a call")
    return {"implementation": "ours, CUDA graph", "host µs": host_microseconds(graph.replay)}


def steps(section: Section, device: torch.device, output: Path, extent: Extent) -> None:
    for batch, amp in itertools.product(extent.batches, (True, False)):
        rows: list[dict[str, Any]] = []
        measure = partial(step_rows, rows, device, extent, batch, amp)
        section.check(f"{of_size(*batch)}, {'AMP' if amp else 'fp32'}", measure)
        section.rows += rows


def of_size(images: int, image_size: tuple[int, int]) -> str:
    return f"{images} of {'×'.join(map(str, image_size))}"


def step_rows(
    rows: list[dict[str, Any]],
    device: torch.device,
    extent: Extent,
    images_of_size: tuple[int, tuple[int, int]],
    amp: bool,
) -> None:
    """Time and memory of a training step of each variant, once their features agree."""
    need("detectron2")
    from gn_det.engine.stopwatch import seconds_of_step

    from gn_det.amp import amp_dtype
    from gn_det.config import get_config
    from gn_det.studies.comparison.cost import step_seconds
    from gn_det.studies.kernels.training_step import made_up_batch
    from gn_det.studies.memory.step import (
        DETECTRON2_GN,
        VARIANTS,
        build_variant,
        count_step,
        measure_step,
    )  # fmt: skip

    cfg = get_config(extent.config)
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = str(device), amp
    dtype = amp_dtype(amp) if device.type == "cuda" else torch.bfloat16
    with torch.device(device):
        models = {variant: build_variant(cfg, variant) for variant in VARIANTS}
    share_weights(models)
    batch = made_up_batch(*images_of_size)
    with torch.autocast(device.type, dtype, enabled=amp):
        check_models(models, batch, tolerance=0.1 if amp else 0.02)
        seconds = step_seconds(models, batch, extent.rounds)
        traces = {
            variant: gaps_in(partial(seconds_of_step, model, batch), calls=3)
            for variant, model in models.items()
            if device.type == "cuda"
        }
    del models
    for variant in VARIANTS:
        row = {
            "norm": variant,
            "images": of_size(*images_of_size),
            "precision": "AMP" if amp else "fp32",
            "step ms": 1000 * seconds[variant],
            "of Detectron2's GN": seconds[variant] / seconds[DETECTRON2_GN],
            "forecast MiB": count_step(cfg, variant, *images_of_size).total / 2**20,
        }
        if device.type == "cuda":
            row["launches"] = traces[variant]["launches"]
            row["busy ms"] = traces[variant]["busy µs"] / 1000
            torch.cuda.empty_cache()
            _, peak = measure_step(cfg, variant, *images_of_size)
            row["peak MiB"] = peak / 2**20
        rows.append(row)


def share_weights(models: dict[str, torch.nn.Module]) -> None:
    """Give the models with GN the same weights, and frozen BN such as leave values finite."""
    from gn_det.studies.memory.step import DETECTRON2_GN, FROZEN_BN

    theirs = models[DETECTRON2_GN].state_dict()
    for variant, model in models.items():
        if variant != FROZEN_BN:
            model.load_state_dict(theirs)
    for module in models[FROZEN_BN].modules():
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.weight.fill_(0.5)  # a frozen identity would let random blocks add up


def check_models(
    models: dict[str, torch.nn.Module], batch: list[dict[str, Any]], tolerance: float
) -> None:
    """Raise where the features of ours are not those of Detectron2's GN, or a loss is not finite.

    Losses are not compared: rounding may choose other proposals. On the CPU features of ResNet-50
    differ by up to 4% in bfloat16, 0.5% in float16 (or TF32, as wide), and not in float32.
    """
    from detectron2.utils.events import EventStorage

    from gn_det.studies.memory.step import DETECTRON2_GN, GN_DET, RECOMPUTE

    features = {}
    for variant, model in models.items():
        with EventStorage(), torch.no_grad():
            loss = float(sum(model(batch).values()))
            features[variant] = model.backbone(model.preprocess_image(batch).tensor)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss of {variant} is {loss}")
    for variant in (GN_DET, RECOMPUTE):
        for level, truth in features[DETECTRON2_GN].items():
            difference = (features[variant][level] - truth).float()
            error = (difference.norm() / truth.float().norm()).item()
            if not error < tolerance:
                raise ArithmeticError(
                    f"{level} of {variant} differs from that of Detectron2's GN by {error:.1%}"
                )


def quickstart(section: Section, device: torch.device, output: Path, extent: Extent) -> None:
    section.check("quickstart", partial(train_quickstart, device, output, extent, section.budget))


def train_quickstart(
    device: torch.device, output: Path, extent: Extent, seconds: float
) -> dict[str, Any]:
    """Generate shapes and train on them; first and last loss, seconds of an iteration, AP."""
    need("detectron2", "cv2", "pycocotools")
    shapes, trained = output / "shapes", output / "quickstart"
    for folder in (shapes, trained):
        shutil.rmtree(folder, ignore_errors=True)
    tool = [sys.executable, str(ROOT / "tools")]
    numbers = ["--num-train", str(extent.quickstart_images), "--num-val", "20"]
    iterations = str(extent.iterations)
    commands = [
        [tool[0], f"{tool[1]}/make_shapes.py", "--output", str(shapes), *numbers],
        [
            *(tool[0], f"{tool[1]}/train_net.py", "--config-file"),
            str(ROOT / "configs/small/quickstart.yaml"),
            *("--train", str(shapes / "train.json"), str(shapes / "images")),
            *("--val", str(shapes / "val.json"), str(shapes / "images")),
            *("OUTPUT_DIR", str(trained), "MODEL.DEVICE", device.type),
            *("SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", iterations),
            *("TEST.EVAL_PERIOD", iterations),
        ],
    ]
    for command in commands:
        log = output / f"{Path(command[1]).stem}.txt"
        if status := run(command, log, seconds, {}):
            last = (log.read_text().splitlines() or [""])[-1]
            raise RuntimeError(f"{Path(command[1]).name} ended with status {status}: {last}")
    metrics = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in metrics if "total_loss" in line]
    check_losses(losses)
    results = json.loads((trained / "results.json").read_text())
    return {
        "iterations": extent.iterations,
        "first loss": losses[0],
        "last loss": losses[-1],
        "seconds of an iteration": [line["time"] for line in metrics if "time" in line][-1],
        **{f"{task} AP": values["AP"] for task, values in results.items()},
    }


def check_losses(losses: list[float]) -> None:
    """Raise where they are not finite, or no less on average in the second half than at first."""
    half = losses[len(losses) // 2 :]
    if not (all(map(math.isfinite, losses)) and sum(half) / len(half) < losses[0]):
        raise ArithmeticError(f"nothing was learnt: the loss went from {losses[0]} to {losses[-1]}")


def run(command: list[str], log: Path, seconds: float, more: dict[str, str]) -> int:
    """The exit status of a command that writes to a log; what takes too long is left out.

    It is interrupted then, as by Ctrl-C, so that its log says how far it came.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | more,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise LeftOut(f"not through in {seconds:.0f} s; see {log}") from error
        finally:
            process.kill()
            process.wait()


def need(*packages: str) -> None:
    """Leave out what needs packages that are not there."""
    if missing := [package for package in packages if not installed(package)]:
        raise LeftOut(f"{', '.join(missing)} is not installed")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Title, function and seconds after which a section begins nothing more: 11.8 minutes in all.
SECTIONS: dict[str, tuple[str, Callable[..., None], float]] = {
    "tests": ("The kernels' tests", kernel_tests, 210),
    "exactness": ("Every form against float64", exactness, 60),
    "times": ("Times of GN+ReLU at 1 image of 800×1333", times, 150),
    "gaps": ("Gaps between launches", gaps, 10),
    "steps": ("A training step of Mask R-CNN", steps, 170),
    "quickstart": ("The quickstart", quickstart, 110),
}


def run_alone(main: Callable[[], int]) -> None:
    """What run_command does that is needed here, where Detectron2 is missing."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if installed("detectron2"):
        from gn_det.engine.command import run_command
    else:
        run_command = run_alone
    run_command(main)
