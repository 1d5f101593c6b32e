"""A Detectron2 config node whose YAML cannot run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import CfgNode

from gn_det.errors import InputError

__all__ = ["SafeCfgNode"]

# An install from Detectron2's repository links its configs into the package.
_PACKAGE = Path(detectron2.__file__).resolve().parent
_DETECTRON2 = (_PACKAGE, (_PACKAGE / "model_zoo" / "configs").resolve())


class SafeCfgNode(CfgNode):
    """CfgNode that reads files with yaml.safe_load, where Detectron2's falls back to unsafe_load.

    Files inside the installed Detectron2 package are exempt: its RetinaNet configs compute their
    anchor sizes with Python tags, and whoever could change them could change Detectron2.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        del allow_unsafe  # decided by where the file lies, for each _BASE_ anew
        folders = Path(filename).resolve().parents
        trusted = any(folder in folders for folder in _DETECTRON2)
        try:
            content = super().load_yaml_with_base(filename, allow_unsafe=trusted)
        except yaml.constructor.ConstructorError as error:
            raise InputError(
                f"{filename}: {error.problem}: tags that run Python are refused; write the value"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{filename} is no YAML: {' '.join(str(error).split())}") from error
        except TypeError as error:  # fvcore looks for _BASE_ in an empty file's None
            raise InputError(f"{filename} holds no config keys") from error
        if not isinstance(content, dict):
            raise InputError(f"{filename} holds no config keys")
        return content
