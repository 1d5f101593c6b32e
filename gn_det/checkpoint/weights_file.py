"""Where weights are: a local file, or an address whose file is downloaded once and kept."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir

from gn_det.errors import InputError

__all__ = ["check_weights_exist", "weights_address"]


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


def check_weights_exist(path: str) -> None:
    """Check that a weights file is there, downloading what has an address.

    Raises:
        InputError: it is not there, or cannot be downloaded; then with its address, and the two
            ways to supply it.
    """
    if not path:
        return
    file = urlparse(path)._replace(query="").geturl()  # Detectron2's ?matching_heuristics=True
    address = weights_address(file)
    try:
        found = Path(PathManager.get_local_path(file)).is_file()
    except (OSError, URLError, KeyError, RuntimeError) as error:
        kept = os.path.join(get_cache_dir(), urlparse(address).path.lstrip("/"))
        reason = " ".join(str(error).split())
        raise InputError(
            f"weights {path} cannot be fetched ({reason}). Download {address} where there is a "
            "network, and give the file as MODEL.WEIGHTS (train.init_checkpoint for a LazyConfig), "
            f"or put it at {kept}, where it is looked for first"
        ) from error
    if not found:
        raise InputError(f"weights {path} do not exist")
