"""Show which norms the model of a config has, site by site, and what has none.

Nothing is trained, and no weights are needed. With --sites, GN is injected there and fused first.
"""

from __future__ import annotations

import argparse
import ast
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
        help="YAML or LazyConfig (.py) file, or the name of one of Detectron2's model zoo; or a "
        "config of mmengine, such as mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
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
    if "::" in config_file or (path.is_file() and is_mmengines(path)):
        with building(f"the model of {config_file}"):
            return build_with_mmengine(config_file, overrides)
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


def is_mmengines(path: Path) -> bool:
    """Whether a file is a config of mmengine, by the names that it assigns, without running it."""
    if path.suffix != ".py":
        return False
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        return False
    assigned = {
        target.id: node.value
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    reads_base = any(isinstance(node, ast.With) and "read_base" in ast.dump(node) for node in body)
    model = assigned.get("model")
    keys = [keyword.arg for keyword in model.keywords] if isinstance(model, ast.Call) else []
    if isinstance(model, ast.Dict):
        keys = [key.value for key in model.keys if isinstance(key, ast.Constant)]
    return reads_base or "type" in keys or not assigned.keys().isdisjoint(_OF_MMENGINE)


_OF_MMENGINE = {"_base_", "custom_imports", "default_scope"}


def build_with_mmengine(config_file: str, overrides: list[str]) -> nn.Module:
    """The model of a config of mmengine, from the registry of its scope.

    Args:
        config_file: a file, or ``package::name``.
        overrides: ``key=value``.

    Raises:
        InputError: mmengine is not there, or the config has no model.
    """
    try:
        from mmengine.config import Config
        from mmengine.registry import MODELS, init_default_scope
    except ImportError as error:
        raise InputError(
            f"{config_file} is a config of mmengine, which is not in this environment"
        ) from error
    # Not by mmengine's get_config, which lets pip install a package that is not there.
    external = "::" in config_file
    config = (
        Config.fromstring(f"_base_ = {config_file!r}", ".py")
        if external
        else Config.fromfile(config_file)
    )
    config.merge_from_dict(dict(_override(each) for each in overrides))
    if "model" not in config:
        raise InputError(f"{config_file} has no model")
    init_default_scope(config.get("default_scope") or "mmengine")
    return MODELS.build(config.model)


def _override(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{text!r} is no override of mmengine's config; write key=value")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


if __name__ == "__main__":
    run_command(main)
