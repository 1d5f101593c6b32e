"""Convert a ResNet of torchvision, timm, mmdetection, Detectron or Detectron2 for MODEL.WEIGHTS.

It writes Detectron2's names (or, by --layout, those of FAIR's .pkl files or of mmdetection), and
beside the weights a config fragment with what a detector has to share with them.

With --timm it writes the file of another timm model, for MODEL.TIMM.WEIGHTS, from weights of any
library whose tensors are in timm's names or in its order.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from gn_det.engine.command import run_command

import torch

from gn_det.checkpoint.backbone_file import (
    check_backbone_file,
    write_backbone,
    write_backbone_for_mmdetection,
)
from gn_det.checkpoint.reading import read_weights
from gn_det.checkpoint.resnet_layouts import (
    ResNetWeights,
    mmdetection_backbone,
    resnet_weights,
    to_detectron,
    to_mmdetection,
)
from gn_det.checkpoint.timm_weights import in_timms_names, top_classes
from gn_det.checkpoint.weights_file import find_weights
from gn_det.errors import InputError
from gn_det.files import whole_file
from gn_det.text import table

# ImageNet's, from 0 to 255, in the order R, G, B.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NO_STD = (1.0, 1.0, 1.0)
# timm's names of ResNets whose anti-aliasing has no weights.
VARIANTS = re.compile(r"resnet(blur|aa)|antialias|_lpf\d", re.IGNORECASE)


def main() -> None:
    args = parse_arguments()
    for_mmdetection = args.layout == "mmdetection"
    check_backbone_file(args.output, for_mmdetection)
    if args.timm:
        convert_for_timm(args)
        return
    if args.layout == "detectron" and args.output.suffix != ".pkl":
        raise InputError(f"Detectron's layout is one of .pkl files, and {args.output} is none")
    file, _ = find_weights(args.input)
    checkpoint = read_weights(file, wrapped=True, key=args.key)
    variant = VARIANTS.search(" ".join(names_of(Path(file), checkpoint)))
    if variant:
        raise InputError(
            f"{file} is refused: {variant[0]!r} in its name is of a ResNet that smooths what it "
            "strides over, which no tensor shows and Detectron2's does not do"
        )
    resnet = resnet_weights(checkpoint, args.prefix)
    config = shared_config(resnet, checkpoint, args)
    if for_mmdetection:
        model = mmdetection_model(resnet, config)
        write_backbone_for_mmdetection(args.output, to_mmdetection(resnet.weights), model)
    else:
        weights = to_detectron(resnet.weights) if args.layout == "detectron" else resnet.weights
        write_backbone(args.output, weights, config)
    print(summary(resnet, config, args.output, for_mmdetection))


def names_of(file: Path, checkpoint: dict[str, Any]) -> list[str]:
    """What tells the network: the file's name and folder, its "arch", and timm's config.json."""
    names = [file.name, file.absolute().parent.name, str(checkpoint.get("arch"))]
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
        names.append(str(config.get("architecture")))
    return names


def convert_for_timm(args: argparse.Namespace) -> None:
    """Write the weights by the names of the timm model, and tell what it sees in the picture."""
    if args.output.suffix != ".pth":
        raise InputError(f"weights of timm models are written as .pth, and {args.output} is none")
    file, _ = find_weights(args.input)
    checkpoint = read_weights(file, wrapped=True, key=args.key)
    weights = in_timms_names(args.timm, checkpoint["model"])
    seen = top_classes(args.timm, weights, args.picture) if args.picture else []
    with whole_file(args.output) as stream:
        torch.save(weights, stream)
    print(f"{args.output}: {len(weights)} tensors, all with the shapes of timm's {args.timm}")
    if left := len(checkpoint["model"]) - len(weights):
        print(f"Left out: {left} tensors of a classifier with other classes")
    if seen:
        rows = [[name, f"{100 * probability:.1f}"] for name, probability in seen]
        print(f"\n{table(rows, [f'seen in {args.picture.name}', '%'])}\n")
    print(f"A config takes it by MODEL.TIMM.NAME {args.timm} MODEL.TIMM.WEIGHTS {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", help="weights: .pth, .pt, .safetensors or .pkl, or a name that MODEL.WEIGHTS has")
    add(
        "--output",
        type=Path,
        required=True,
        help=".pth, .safetensors or .pkl; the fragment ends in .yaml (.py for mmdetection)",
    )
    add(
        "--layout",
        choices=("detectron2", "detectron", "mmdetection"),
        default="detectron2",
        help="names to write; default: %(default)s",
    )
    add("--key", help="key of the weights, where the file has several, such as averages (EMA)")
    add("--prefix", help="prefix of the names to take, where the file has several ResNets")
    what = "of the images that it was trained on, from 0 to 255, in the order of INPUT.FORMAT"
    for flag in ("--pixel-mean", "--pixel-std"):
        add(flag, nargs=3, type=float, metavar=("C1", "C2", "C3"), help=what)
    add("--input-format", choices=("RGB", "BGR"), help="order of the colours that it takes")
    add(
        "--stride-in-1x1",
        choices=("true", "false"),
        help="where bottlenecks have their stride: in the first 1x1 convolution, or in the 3x3",
    )
    add("--timm", metavar="MODEL", help="model of timm whose file to write")
    add("--picture", type=Path, help="with --timm: show what the model sees in it, as a check")
    args = parser.parse_args()
    of_resnets = ("prefix", "pixel_mean", "pixel_std", "input_format", "stride_in_1x1")
    if args.timm and (args.layout != "detectron2" or any(getattr(args, n) for n in of_resnets)):
        parser.error("--timm goes with --key and --picture alone")
    if args.picture and not args.timm:
        parser.error("--picture goes with --timm")
    return args


def shared_config(
    resnet: ResNetWeights, checkpoint: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """What a detector has to share with the weights, by whole config keys.

    The layout tells what names and shapes do not; flags go first.

    Raises:
        InputError: neither does; with the flags to give.
    """
    resnets = resnet.resnets
    order, stride, mean, std = None, None, None, None
    of_detector = resnet.prefix.endswith("backbone.")
    if resnet.layout == "torchvision" and of_detector:  # mmdetection's, in one of two orders
        order, stride, mean, std = mmdetection_input(checkpoint)
    elif resnet.layout == "torchvision" or checkpoint.get("__author__") == "torchvision":
        order, stride, mean, std = "RGB", False, MEAN, STD
    elif resnet.layout == "Detectron":  # as detectron2.checkpoint.catalog has it of FAIR's files
        order, mean = "BGR", MEAN[::-1]
        # Detectron2's configs of X-101-32x8d divide by a std; the file does not show it.
        std = NO_STD if resnets["NUM_GROUPS"] == 1 else None
        if resnets["NORM"] == "GN" or resnets["NUM_GROUPS"] > 1:
            stride = False
    if resnets["DEPTH"] < 50:
        stride = False  # there is no 1x1
    if args.input_format and args.input_format != order and mean:
        mean, std = mean[::-1], std and std[::-1]
    config = {
        "INPUT.FORMAT": args.input_format or order,
        "MODEL.PIXEL_MEAN": args.pixel_mean or mean,
        "MODEL.PIXEL_STD": args.pixel_std or std,
        "MODEL.RESNETS.STRIDE_IN_1X1": {"true": True, "false": False, None: stride}[
            args.stride_in_1x1
        ],
    }
    flags = ("--input-format", "--pixel-mean", "--pixel-std", "--stride-in-1x1 true or false")
    unknown = [flag for flag, value in zip(flags, config.values(), strict=True) if value is None]
    if unknown:
        raise InputError(
            f"{args.input}: weights of {resnet.layout} do not show all that a detector has to "
            f"share with them; give {', '.join(unknown)} (from the config of their training)"
        )
    if 0 < max(config["MODEL.PIXEL_MEAN"]) < 1 or max(config["MODEL.PIXEL_STD"]) < 1:
        raise InputError("--pixel-mean and --pixel-std are for pixels from 0 to 255, not to 1")
    return {**{f"MODEL.RESNETS.{key}": value for key, value in resnets.items()}, **config}


def mmdetection_model(resnet: ResNetWeights, config: dict[str, Any]) -> dict[str, Any]:
    """The same, by keys of a config's model in mmdetection, whose pictures come as BGR."""
    rgb = config["INPUT.FORMAT"] == "RGB"
    stride_in_1x1 = config["MODEL.RESNETS.STRIDE_IN_1X1"]
    return {
        "data_preprocessor": {
            "mean": list(config["MODEL.PIXEL_MEAN"]),
            "std": list(config["MODEL.PIXEL_STD"]),
            "bgr_to_rgb": rgb,
        },
        "backbone": mmdetection_backbone(resnet.resnets, stride_in_1x1),
    }


def mmdetection_input(
    checkpoint: dict[str, Any],
) -> tuple[str | None, bool | None, tuple[float, ...] | None, tuple[float, ...] | None]:
    """Order of colours, stride in 1x1, mean and std of the config in an mmdetection checkpoint.

    What it does not say, or says in two ways, is None.
    """
    meta = checkpoint.get("meta")
    texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, dict) else []
    text = next((each for each in texts if isinstance(each, str)), "")

    def only(pattern: str) -> str | None:
        found = set(re.findall(pattern, text))
        return found.pop() if len(found) == 1 else None

    def numbers(name: str) -> tuple[float, ...] | None:
        found = only(rf"\b{name}\s*=\s*[\[(]([\d., e+-]+)[\])]")
        return tuple(float(n) for n in found.split(",") if n.strip()) if found else None

    to_rgb = only(r"\b(?:bgr_)?to_rgb\s*=\s*(True|False)")
    style = only(r"\bstyle\s*=\s*['\"](pytorch|caffe)['\"]")
    return (
        {"True": "RGB", "False": "BGR", None: None}[to_rgb],
        {"caffe": True, "pytorch": False, None: None}[style],
        numbers("mean"),
        numbers("std"),
    )


def summary(
    resnet: ResNetWeights, config: dict[str, Any], output: Path, for_mmdetection: bool
) -> str:
    """What was taken and dropped, and how to use what was written."""
    parts = Counter(
        "num_batches_tracked" if name.endswith("num_batches_tracked") else name.split(".")[0]
        for name in resnet.dropped
    )
    dropped = ", ".join(f"{part} {count}" for part, count in parts.items())
    groups, width = resnet.resnets["NUM_GROUPS"], resnet.resnets["WIDTH_PER_GROUP"]
    norm = "GN, taken to have 32 groups" if resnet.resnets["NORM"] == "GN" else "BN, as FrozenBN"
    fragment = output.with_suffix(".py" if for_mmdetection else ".yaml")
    rows = [
        ("layout", resnet.layout + (" (or timm)" if resnet.layout == "torchvision" else "")),
        ("depth", resnet.resnets["DEPTH"]),
        ("groups x width", f"{groups} x {width}"),
        ("norm", norm),
        ("stride in 1x1", config["MODEL.RESNETS.STRIDE_IN_1X1"]),
        ("input", f"{config['INPUT.FORMAT']}, mean {list(config['MODEL.PIXEL_MEAN'])}, "
                  f"std {list(config['MODEL.PIXEL_STD'])}"),
        ("tensors taken", len(resnet.weights)),
        ("tensors dropped", f"{len(resnet.dropped)} ({dropped})" if dropped else 0),
        ("weights", output),
        ("fragment", fragment),
    ]  # fmt: skip
    use = f"A config takes both: _BASE_: [recipe.yaml, {fragment.name}]"
    if for_mmdetection:
        use = f"In {fragment.name}, name the config of mmdetection's to start from in _base_"
    return f"{table(rows, tablefmt='plain')}\n{use}"


if __name__ == "__main__":
    run_command(main)
