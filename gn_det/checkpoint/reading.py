"""Reading weights files by their endings, without running anything that they hold."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from gn_det.budget import check_archive
from gn_det.checkpoint.unpickling import RECORDS, unpickle
from gn_det.errors import InputError
from gn_det.modeling.bn_weights import check_variances
from gn_det.text import shortened

__all__ = ["read_weights"]

# Where weights lie below a key that names them, such as "ema".
_WRAPPERS = ("state_dict", "module", "model", "ema_state", "shadow")


def read_weights(
    file: str | Path, *, wrapped: bool = False, key: str | None = None
) -> dict[str, Any]:
    """Read a weights file as Detectron2's checkpointer does, but for that nothing in it can run.

    ``.pkl`` is a file of Detectron2's model zoo, or of Detectron's (Caffe2), ``.pyth`` one of
    pycls, ``.safetensors`` that format, and anything else is read by torch.load with
    ``weights_only=True``, onto the CPU; of arguments, configs and logs that programs keep beside
    the weights (:data:`gn_det.checkpoint.unpickling.RECORDS`) nothing but their places is read.

    Args:
        file: a local file.
        wrapped: whether weights may also lie under "state_dict", where other programs put them.
        key: under which the weights lie, where a wrapped file has several.

    Returns:
        ``"model"``: tensors by name; of a wrapped file, ``"meta"`` and ``"arch"`` beside them or
        None; ``"matching_heuristics"``: True where Detectron2 is to find their places by the ends
        of the names; ``"__author__"``: "Caffe2" for Detectron's names; and whatever else the file
        holds.

    Raises:
        InputError: the file asks for anything but tensors, arrays and plain containers (which is
            named), is damaged, or holds no weights.
    """
    file = Path(file)
    read = {".pkl": _read_pkl, ".pyth": _read_pyth, ".safetensors": _read_safetensors}
    loaded = read.get(file.suffix, _read_pth)(file)
    model = loaded["model"]
    if wrapped and isinstance(model, dict):
        content = model if loaded.keys() == {"model"} else loaded
        chosen = _chosen(content, key, file)
        model = loaded["model"] = _tensors(model if chosen is None else chosen, file)
        loaded |= {name: content.get(name) for name in ("meta", "arch")}
    if not isinstance(model, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in model.items()
    ):
        found = type(model).__name__
        if isinstance(model, dict):
            found = shortened(model, 3)
        raise InputError(
            f"{file} holds no weights under 'model' nor at its top, but {found}; save the "
            "model's state_dict alone"
        )
    for name, value in model.items():
        if value.layout == torch.strided and value.nbytes > value.untyped_storage().nbytes():
            raise InputError(
                f"{file} is refused: {name!r} is {tuple(value.shape)}, more than the file "
                "holds of it"
            )
        is_small_float = value.is_floating_point() and value.dtype.itemsize < 2
        if value.is_meta or value.is_complex() or is_small_float:
            what = "without values" if value.is_meta else f"of {value.dtype}"
            raise InputError(
                f"{file} is refused: {name!r} is {what}; save weights of float32, float16 or "
                "bfloat16"
            )
        if value.is_floating_point() and value.layout == torch.strided:
            broken = value.numel() - int(value.isfinite().sum())
            if broken:
                raise InputError(
                    f"{file} is refused: {broken} of the {value.numel()} values of {name!r} are "
                    "infinite or no numbers; take a checkpoint from before the training diverged"
                )
    check_variances(model, file)
    return loaded


def _chosen(content: dict[str, Any], key: str | None, file: Path) -> Any:
    """What lies under a key, or the usual one; None for content itself.

    Averages of the weights (EMA) beside them have to be chosen.
    """
    sets = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and _is_state(value) and not name.startswith("optim")
    }
    for name, value in list(sets.items()):
        if not any(isinstance(each, torch.Tensor) for each in value.values()):
            sets[name] = next(value[w] for w in _WRAPPERS if _is_state(value.get(w)))
    if key is not None:
        if key not in sets:
            raise InputError(
                f"{file} has no weights under {key!r}, but under {shortened(sets, 10)}"
            )
        return sets[key]
    averaged = [name for name in sets if re.search(r"ema|averag|swa", name, re.IGNORECASE)]
    plain = [name for name in ("state_dict", "model_state", "model") if name in sets]
    if averaged:
        names = ", ".join(map(repr, dict.fromkeys([*plain, *averaged])))
        raise InputError(
            f"{file} has several weights, of which {shortened(map(repr, averaged), 3)} are "
            f"averages of the training (EMA); choose with --key: {names}"
        )
    return sets[plain[0]] if plain else None


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and (
        any(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in value.items())
        or any(_is_state(value.get(wrapper)) for wrapper in _WRAPPERS)
    )


def _read_pkl(file: Path) -> dict[str, Any]:
    content = _as_dict(unpickle(file), file)
    if "__author__" in content or isinstance(content.get("model"), dict):
        return {**content, "model": _tensors(content.get("model"), file)}
    blobs = _as_dict(content.get("blobs", content), file)  # ImageNet's models are blobs alone
    blobs = {name: blob for name, blob in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": _tensors(blobs, file), "__author__": "Caffe2", "matching_heuristics": True}


def _read_pyth(file: Path) -> dict[str, Any]:
    content = _torch_load(file)
    if "model_state" not in content:
        raise InputError(f"{file} has no 'model_state', which pycls writes into .pyth files")
    state = _as_dict(content["model_state"], file)
    model = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
    return {"model": model, "__author__": "pycls", "matching_heuristics": True}


def _read_pth(file: Path) -> dict[str, Any]:
    content = _torch_load(file)
    return content if "model" in content else {"model": content}


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as archive:
            metadata, names = archive.metadata() or {}, archive.keys()
            loaded: dict[str, Any] = {"model": {name: archive.get_tensor(name) for name in names}}
    except Exception as error:  # OSError, SafetensorError, and torch's of dtypes
        raise _unreadable(file, error) from error
    if metadata.get("matching_heuristics") == "True":
        loaded["matching_heuristics"] = True
    return loaded


def _torch_load(file: Path) -> dict[str, Any]:
    check_archive(file)
    try:
        with warnings.catch_warnings():  # of TorchScript archives, which are then refused
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(RECORDS):
                return _as_dict(torch.load(file, map_location="cpu", weights_only=True), file)
    except InputError:
        raise
    except Exception as error:  # whatever torch makes of foreign files; it advises to load unsafely
        asked_for = re.search(r"GLOBAL `?([\w.]+)", str(error))
        if asked_for:
            raise InputError(
                f"{file} is refused: it asks for {asked_for.group(1)}, and files are read that "
                "hold tensors and plain containers only; save the model's state_dict alone"
            ) from error
        if "TorchScript" in str(error):
            raise InputError(
                f"{file} is refused: it is a TorchScript archive, which is a program; save the "
                "model's state_dict alone"
            ) from error
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    if "Weights only load failed" in str(error):
        reason = "it is no file that torch.save wrote"
    else:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return InputError(f"{file} cannot be read as weights: {reason}")


def _as_dict(content: Any, file: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(
            f"{file} cannot be read as weights: it holds no dict, but {type(content).__name__}"
        )
    return content


def _tensors(blobs: Any, file: Path) -> Any:
    """With the arrays and scalars of a dict as tensors in memory of their own."""
    if not isinstance(blobs, dict):
        return blobs
    tensors = dict(blobs)
    for name, value in blobs.items():
        if isinstance(value, (np.ndarray, np.generic)):
            try:
                tensors[name] = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
            except TypeError as error:
                raise InputError(f"{file}: {name} has no numbers, but {value.dtype}") from error
    return tensors
