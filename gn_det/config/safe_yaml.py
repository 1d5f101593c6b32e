"""A Detectron2 config node whose YAML cannot run code, hide a section, or cost much to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import detectron2
import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY

from gn_det.errors import InputError
from gn_det.files import check_regular_file

__all__ = ["SafeCfgNode"]

# An install from Detectron2's repository links its configs into the package.
_PACKAGE = Path(detectron2.__file__).resolve().parent
_DETECTRON2 = (_PACKAGE, (_PACKAGE / "model_zoo" / "configs").resolve())

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"  # of yaml's nodes

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # values, each counted as often as an alias repeats it
MAX_DEPTH = 50


class SafeCfgNode(CfgNode):
    """CfgNode that reads files with yaml.safe_load, where Detectron2's falls back to unsafe_load.

    Files inside the installed Detectron2 package are exempt: its RetinaNet configs compute their
    anchor sizes with Python tags, and whoever could change them could change Detectron2.
    """

    _reading: ClassVar[list[Path]] = []  # files whose _BASE_ is being read

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        del allow_unsafe  # decided by where the file lies, for each _BASE_ anew
        if "://" in filename:
            raise InputError(f"config {filename} is an address; download it, and name the file")
        check_regular_file(filename, "config file")
        path = Path(filename).resolve()
        if path in cls._reading:
            chain = " -> ".join(str(each) for each in (*cls._reading, path))
            raise InputError(f"_BASE_ leads back to its beginning: {chain}")
        trusted = any(folder in path.parents for folder in _DETECTRON2)
        cls._reading.append(path)
        try:
            if not trusted:
                _check(path)
            content = super().load_yaml_with_base(filename, allow_unsafe=trusted)
        except yaml.constructor.ConstructorError as error:
            raise InputError(
                f"{filename}: {error.problem}: tags that run Python are refused; write the value"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{filename} is no YAML: {' '.join(str(error).split())}") from error
        except TypeError as error:  # fvcore looks for _BASE_ in an empty file's None
            raise InputError(f"{filename} holds no config keys") from error
        finally:
            cls._reading.pop()
        if not isinstance(content, dict):
            raise InputError(f"{filename} holds no config keys")
        return content


def _check(file: Path) -> None:
    """Check the budgets of a YAML file, and that no mapping has a key twice."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{file} has {size} bytes, and a config at most {MAX_BYTES}")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except RecursionError as error:
        raise InputError(f"{file} is nested deeper than {MAX_DEPTH}") from error
    if root is not None:
        _count(root, file, {}, 1)


def _count(node: yaml.Node, file: Path, counts: dict[yaml.Node, int], depth: int) -> int:
    """Values below a node, those behind aliases as often as they are repeated."""
    if node in counts:
        return counts[node]
    counts[node] = MAX_NODES + 1  # where an alias leads back here
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = f"{file}, line {key.start_mark.line + 1}"
            if key.tag not in (_TEXT, _MERGE):
                raise InputError(f"{line}: a key is no text; put it into quotes")
            if key.value in seen:
                raise InputError(
                    f"{line}: {key.value} stands here a second time, and would replace the first; "
                    "merge the two"
                )
            bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if key.value == BASE_KEY and any(b.tag != _TEXT or not b.value for b in bases):
                raise InputError(f"{line}: {BASE_KEY} is no name of a config file")
            seen.add(key.value)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    if depth > MAX_DEPTH:
        raise InputError(f"{file} is nested deeper than {MAX_DEPTH}")
    counts[node] = total = 1 + sum(_count(part, file, counts, depth + 1) for part in parts)
    if total > MAX_NODES:
        raise InputError(f"{file} unfolds to more than {MAX_NODES} values; write without aliases")
    return total
