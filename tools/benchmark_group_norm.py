#!/usr/bin/env python
"""What the group_norm kernels cost on the shapes of Mask R-CNN R-50-FPN, as tables.

Without a GPU everything is counted: passes over memory in Triton's interpreter, machine code
compiled ahead of time, accuracy, and other implementations beside. With one, times are added, once
the results have been checked on it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gn_det.engine.command import at_least, run_command

import torch
from tabulate import tabulate
from tqdm import tqdm

from gn_det.ops.form import FORMS
from gn_det.studies.kernels import report as kernel_report
from gn_det.studies.kernels.estimate import ASSUMPTIONS, CARDS, estimate_rows
from gn_det.studies.kernels.host import backbone_rows, call_rows
from gn_det.studies.kernels.peers import peer_rows
from gn_det.studies.kernels.training_step import training_step_row
from gn_det.studies.memory.step import memory_rows

SECTIONS = ("traffic", "code", "accuracy", "peers", "memory", "step", "host", "estimate")


def main() -> None:
    args = parse_arguments()
    variants = list(itertools.product(kernel_report.DTYPES, kernel_report.LAYOUTS))
    sections = {
        "traffic": lambda: traffic(args, variants),
        "code": lambda: code(args, variants),
        "accuracy": accuracy,
        "peers": lambda: show("Peers: GN then ReLU on res2, 1×256×200×336, bf16", peer_rows()),
        "memory": lambda: memory(args),
        "step": lambda: show("A training step on the CPU", [training_step_row()]),
        "estimate": lambda: estimate(args),
        "host": host,
    }
    for name in args.sections:
        sections[name]()
    if torch.cuda.is_available():
        timings(args, variants)
    else:
        print("\nNo GPU: nothing was timed.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="GN+ReLU",
        help="what a call computes (default: %(default)s)",
    )
    parser.add_argument(
        "--ims-per-gpu",
        **at_least(1),
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="images per GPU (default: 1 2)",
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="tables to print (default: all)",
    )
    return parser.parse_args()


def traffic(args: argparse.Namespace, variants: list[tuple[str, str]]) -> None:
    for images in args.ims_per_gpu:
        rows = in_interpreter(
            kernel_report.traffic_row,
            [
                (case, args.form, dtype, layout)
                for dtype, layout in variants
                for case in kernel_report.mask_rcnn_cases(images)
            ],
        )
        show(f"Traffic: {args.form}, {images} image(s) of 800×1333", rows)
    print(
        "\nPasses are reads (R) and writes (W) of tensors of the input's size. Other is all else\n"
        "that launches load and store (statistics, parameters, partial sums, mostly from caches),\n"
        "as a share of the passes. Sectors is the used share of the 32-byte sectors touched: rows\n"
        "of 7×7 and of odd widths start and end inside one."
    )


def code(args: argparse.Namespace, variants: list[tuple[str, str]]) -> None:
    cases = [case for images in args.ims_per_gpu for case in kernel_report.mask_rcnn_cases(images)]
    rows = []
    for dtype, layout in tqdm(variants, desc="compiling", unit="variant"):
        rows += kernel_report.code_rows(cases, args.form, dtype, layout)
    show(f"Machine code: {args.form}, registers a thread on four GPUs", rows)
    print(
        "\nLoads and stores of the loop (without one, of the kernel) by bits, on sm_90. Where a\n"
        "split takes more than 64 registers, or one pass more than 128, a thread holds several\n"
        "channels, each with its parameters and sums: 8 in channels_last, 4 in fp32."
    )


def accuracy() -> None:
    rows = in_interpreter(kernel_report.accuracy_rows, [()])[0]
    show("Accuracy: largest error against float64, in ulp of the largest value", rows)


def memory(args: argparse.Namespace) -> None:
    for images in args.ims_per_gpu:
        rows = memory_rows(images)
        show(f"Kept for backward: Mask R-CNN in bf16, {images} image(s) of 800×1333, MiB", rows)


def estimate(args: argparse.Namespace) -> None:
    for card in CARDS:
        for images in args.ims_per_gpu:
            cases = kernel_report.mask_rcnn_cases(images)
            rows = estimate_rows(cases, args.form, "bf16", "contiguous", card)
            show(f"Estimate, not measured: {args.form}, bf16, {card}, {images} image(s)", rows)
    print(f"\n{ASSUMPTIONS}")


def host() -> None:
    show("Host: µs of a call of 1×64×4×4 on one thread, medians", call_rows())
    print(
        "\nATen's GN, then add, then ReLU do compute here. Ours is timed without its launches,\n"
        "and with those up to the driver, in whose place is a stub."
    )
    show("Host: a training step of a narrow R-50-FPN, 1×3×64×64, on one thread", backbone_rows())


def timings(args: argparse.Namespace, variants: list[tuple[str, str]]) -> None:
    os.environ["GN_DET_BACKEND"] = "triton"  # ours, or an error
    for images in args.ims_per_gpu:
        cases = kernel_report.mask_rcnn_cases(images)
        rows = [
            kernel_report.timing_row(case, args.form, dtype, layout)
            for dtype, layout in variants
            for case in tqdm(cases, desc=f"timing {dtype} {layout}", unit="shape")
        ]
        name = torch.cuda.get_device_name()
        show(f"Times on {name}: {args.form}, {images} image(s) of 800×1333", rows)


def in_interpreter(function: Callable, calls: list[tuple]) -> list[Any]:
    """Call a function in another process, where Triton interprets its kernels on the CPU."""
    settings = {"TRITON_INTERPRET": "1", "GN_DET_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as executor:
            futures = [executor.submit(function, *call) for call in calls]
            progress = tqdm(futures, desc=function.__name__, unit="row", disable=len(calls) == 1)
            return [future.result() for future in progress]
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n## {title}\n\n{tabulate(rows, headers='keys', tablefmt='github', floatfmt='.3g')}")


if __name__ == "__main__":
    run_command(main)
