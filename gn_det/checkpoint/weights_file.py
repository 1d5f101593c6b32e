"""Where weights are: a local file, or an address whose file is downloaded once and kept."""

from __future__ import annotations

import re
from pathlib import Path

from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.utils.file_io import Detectron2Handler

from gn_det.checkpoint.download import fetch, is_address, kept_at
from gn_det.checkpoint.reading import read_weights
from gn_det.errors import InputError
from gn_det.files import check_regular_file

__all__ = ["check_weights_exist", "find_weights", "weights_address"]

_MATCHING = re.compile(r"\?matching_heuristics=True$")  # a flag of Detectron2's, not of the address


def weights_address(path: str) -> str:
    """The http address behind Detectron2's catalog:// and detectron2:// names; others as they are.

    Raises:
        InputError: Detectron2's catalog does not have the name.
    """
    if path.startswith(Detectron2Handler.PREFIX):
        return path.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX, 1)
    if path.startswith(ModelCatalogHandler.PREFIX):
        try:
            return ModelCatalog.get(path.removeprefix(ModelCatalogHandler.PREFIX))
        except RuntimeError as error:
            raise InputError(f"weights {path} are not in Detectron2's catalog") from error
    return path


def find_weights(path: str) -> tuple[Path, bool]:
    """The local file of weights, downloaded where they have an address.

    Args:
        path: a file, an address, or a name of Detectron2's; ``?matching_heuristics=True`` may
            follow, as in Detectron2.

    Returns:
        The file, and whether that followed.

    Raises:
        InputError: it is not there, or cannot be downloaded; then with its address, and the two
            ways to supply it.
    """
    name, flags = _MATCHING.subn("", path)
    address = weights_address(name)
    if not is_address(address):
        file, _, query = address.partition("?")
        if query:
            raise InputError(f"{path}: ?{query} is not known; ?matching_heuristics=True is")
        check_regular_file(file, "weights")
        return Path(file), bool(flags)
    kept = kept_at(address)
    try:
        return fetch(address, lambda file: read_weights(file, wrapped=True)), bool(flags)
    except InputError as error:
        raise InputError(
            f"weights {path}: {error}. Download {address} where there is a network, and name the "
            "local file instead, as in MODEL.WEIGHTS (train.init_checkpoint for a LazyConfig), or "
            f"put it at {kept}, where it is looked for first"
        ) from error


def check_weights_exist(path: str) -> None:
    """:func:`find_weights`, unless path is empty.

    Raises:
        InputError: see there.
    """
    if path:
        find_weights(path)
