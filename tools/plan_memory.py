"""Count the memory of training with a config, and say what fits on a GPU, without a GPU or data.

The model of the config is counted with frozen BN, with Detectron2's GN, with gn_det's, and with
gn_det's and MODEL.GN.RECOMPUTE. It supports GeneralizedRCNN with RPN and StandardROIHeads,
CascadeROIHeads or Res5ROIHeads, RetinaNet, and their GN forms. With a GPU, it also runs and
measures one step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gn_det.engine.command import add_overrides, at_least, run_command

import torch
from detectron2.config import CfgNode

from gn_det.config import load_config
from gn_det.errors import InputError
from gn_det.plots.figures import check_new_png
from gn_det.studies.memory.plan import (
    MARGIN,
    GpuMemory,
    PlannedStep,
    advice,
    fixed_table,
    plan,
    plan_table,
    plot_plan,
)
from gn_det.studies.memory.step import GN_DET, RECOMPUTE, StepMemory, measure_step

NOT_COUNTED = f"""Not counted: CUDA's context, the workspace of convolutions, gradients of
activations, what losses, proposals and sampling keep, fragmentation. "fits" leaves
{100 * MARGIN:.0f}% of the GPU for these. Gradients come as activations go, so that both are never
there as a whole."""


def main() -> None:
    args = parse_arguments()
    gpu = GpuMemory.parse(args.gpu_memory)
    cfg = load_config(args.config_file, args.opts)
    sizes = [parse_size(text) for text in args.sizes] if args.sizes else default_sizes(cfg)
    check_new_png(args.output)
    steps = plan(cfg, sorted(set(args.ims_per_gpu)), sorted(set(sizes)))
    print(report(cfg, steps, gpu, sizes))
    plot_plan(steps, gpu, args.output)
    print(f"\nThe plot is {args.output}.")
    if torch.cuda.is_available():
        print(f"\n{measured(cfg, next(step for step in steps if step.variant == own(cfg)), steps)}")
    else:
        print("No GPU: nothing was measured.")


def report(
    cfg: CfgNode,
    steps: dict[PlannedStep, StepMemory],
    gpu: GpuMemory,
    sizes: Sequence[tuple[int, int]],
) -> str:
    """The tables, and what to change where GN as the config has it does not fit."""
    precision = "mixed precision" if cfg.SOLVER.AMP.ENABLED else "float32"
    lines = [
        f"A training step in {precision}, FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}, in MiB; "
        '"the rest" is parameters, gradients, momentum and the images.',
        plan_table(steps, gpu),
        f"Of {own(cfg)}, whatever the images, in MiB:",
        fixed_table(next(memory for step, memory in steps.items() if step.variant == own(cfg))),
        NOT_COUNTED,
    ]
    too_large = [s for s, m in steps.items() if s.variant == own(cfg) and not gpu.fits(m)]
    if too_large:
        changes = [f"  {advice(cfg, step, gpu, sizes)}" for step in too_large]
        lines.append("\n".join(["What to change where GN does not fit:", *changes]))
    return "\n\n".join(lines)


def measured(cfg: CfgNode, step: PlannedStep, steps: dict[PlannedStep, StepMemory]) -> str:
    """Estimate and measurement of a step on this machine's GPU."""
    memory = steps[step]
    try:
        kept, peak = measure_step(cfg, step.variant, step.num_images, step.image_size)
    except torch.OutOfMemoryError as error:
        return f"{step.variant}, {step.name}, did not fit: {' '.join(str(error).split())}"
    return (
        f"{step.variant}, {step.name}, on {torch.cuda.get_device_name()}: "
        f"activations {memory.kept / 2**20:.0f} MiB estimated, {kept / 2**20:.0f} measured; "
        f"with the rest {memory.total / 2**20:.0f} estimated, at most {peak / 2**20:.0f} measured."
    )


def own(cfg: CfgNode) -> str:
    """The variant that the config asks for, with GN."""
    return RECOMPUTE if cfg.MODEL.GN.RECOMPUTE else GN_DET


def default_sizes(cfg: CfgNode) -> list[tuple[int, int]]:
    """The largest images of the config, and the same at 3/5 and 4/5 of their size."""
    height, width = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    return [(round(height * part), round(width * part)) for part in (0.6, 0.8, 1)]


def parse_size(text: str) -> tuple[int, int]:
    """Read such as 800x1333."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise InputError(f"--sizes {text}: give HEIGHTxWIDTH, such as 800x1333")
    return int(height), int(width)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a YAML config")
    parser.add_argument("--gpu-memory", required=True, help="memory of the GPU, such as 8GiB")
    parser.add_argument(
        "--ims-per-gpu",
        **at_least(1),
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help="images per GPU to plan for (default: 1 2 4)",
    )
    parser.add_argument("--sizes", nargs="+", metavar="HxW", help="default: from INPUT.*_TRAIN")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("memory.png"),
        help="PNG file to write; default: %(default)s",
    )
    add_overrides(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
