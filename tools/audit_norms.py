"""Show which norms the model of a config has, site by site, and what has none.

Nothing is trained, and no weights are needed. With --sites, GN is injected there and fused first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gn_det.engine.building import building
from gn_det.engine.command import add_overrides, run_command

from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from torch import nn

from gn_det import audit, fuse, inject
from gn_det.config import load_config, load_lazy_config
from gn_det.errors import InputError
from gn_det.injection.audit import Audit

FORMATS = {"text": str, "markdown": Audit.to_markdown, "json": Audit.to_json}


def main() -> None:
    args = parse_arguments()
    model = build(args.config_file, args.opts)
    if args.sites:
        fuse(inject(model, args.sites))
    print(FORMATS[args.format](audit(model)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file",
        required=True,
        help="YAML or LazyConfig (.py) file, or the name of one of Detectron2's model zoo",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        metavar="SITE",
        help="see gn_det.inject; ALL for all. End them with -- if config overrides follow",
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    add_overrides(parser)
    return parser.parse_args()


def build(config_file: str, overrides: list[str]) -> nn.Module:
    """The model of a config on the CPU, with random weights.

    Raises:
        InputError: there is no such config, or it says what cannot be built.
    """
    path = Path(config_file)
    if not path.is_file():
        try:
            path = Path(model_zoo.get_config_file(config_file))
        except RuntimeError as error:
            raise InputError(
                f"{config_file} is no file, and no config of Detectron2's model zoo"
            ) from error
    with building(f"the model of {config_file}"):
        if path.suffix == ".py":
            return instantiate(load_lazy_config(path, overrides).model)
        without_weights = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""]
        return build_model(load_config(path, [*overrides, *without_weights]))


if __name__ == "__main__":
    run_command(main)
