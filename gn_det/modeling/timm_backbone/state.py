"""State dicts for timm's models: what files hold, and whether a model takes all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gn_det.budget import check_archive
from gn_det.errors import InputError
from gn_det.modeling.bn_weights import check_variances
from gn_det.modeling.timm_backbone.names import classifiers_of, flat_name
from gn_det.text import reason_of, shortened

__all__ = ["check_all_loaded", "check_none_left", "fits", "read_state", "without_prefix"]


def read_state(file: str) -> dict[str, Tensor]:
    """The tensors of a file, which must have numbers.

    Raises:
        InputError: there is no such file, it holds anything but tensors and plain containers,
            would take much memory to read (:mod:`gn_det.budget`), or numbers are not finite.
    """
    from timm.models import load_state_dict

    file = str(Path(file).expanduser())
    if not Path(file).is_file():
        raise InputError(
            f"MODEL.TIMM.WEIGHTS (weights of TimmBackbone) {file}: no such file; name one, or "
            '"timm" for those that timm downloads. tools/convert_bn_to_gn.py --backbone makes what '
            "recipes call calibrated and distilled, and `make weights/lite0.pth` the others"
        )
    if not file.endswith(".safetensors"):
        check_archive(Path(file))
    try:
        state = load_state_dict(file, weights_only=True)
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # whatever torch and safetensors make of foreign files
        reason = reason_of(error).partition(" No automatic")[0]  # advice to load unsafely
        raise InputError(f"{file} holds no weights that can be read: {reason}") from error
    if not tensors:
        raise InputError(
            f"{file} holds no weights, but {shortened(state, 5) or 'nothing'}; save the state dict "
            "alone, or under state_dict"
        )
    floats = {k: v.float() for k, v in tensors.items() if v.is_floating_point()}
    broken = [key for key, value in floats.items() if not value.isfinite().all()]
    if broken:
        raise InputError(
            f"{file}: {len(broken)} of {len(tensors)} tensors have infinite or no numbers "
            f"({shortened(broken, 3)})"
        )
    check_variances(tensors, file)
    return tensors


def without_prefix(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The weights of a model that others hold under names of theirs, such as ``model.backbone.``.

    Of several such names, the one with the most of the model's tensors is taken.

    Raises:
        InputError: two have as many.
    """
    if state.keys() & names:
        return state
    prefixes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in names:
                prefixes[".".join(parts[:i]) + "."] += 1
    if not prefixes:
        return state
    (prefix, most), *others = prefixes.most_common()
    if others and others[0][1] == most:
        raise InputError(
            f"the weights hold the model twice, as {prefix}* and as {others[0][0]}*; save one alone"
        )
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def fits(body: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has each tensor of a model by the model's own name."""
    return all(
        key in state and state[key].shape == value.shape for key, value in _tensors(body).items()
    )


def check_all_loaded(body: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """timm loads what fits and says nothing of the rest."""
    # With features, some classes join the parts of a name in another way.
    named = {flat_name(key): value for key, value in state.items()}
    own = _tensors(body)
    # What timm translates has other names: of these, it is found out by the values.
    flat = {flat_name(key) for key in own}
    others = {_fingerprint(value) for key, value in named.items() if key not in flat}
    missing = [
        key
        for key, value in own.items()
        if flat_name(key) not in named and _fingerprint(value) not in others
    ]
    if missing:
        raise InputError(
            f"{file} does not fit the timm model: it lacks {len(missing)} of {len(own)} tensors "
            f"({shortened(missing, 3)})"
        )


def check_none_left(
    whole: Any, body: nn.Module, state: Mapping[str, Tensor], file: str, *, by_name: bool
) -> None:
    """Check that the parts of a model have no more tensors in a file than they can take.

    Files by other names than timm's now, which it translates, are not checked.
    """
    heads = {name.partition(".")[0] for name in classifiers_of(whole)}
    own = {key for key in _tensors(whole) if key.partition(".")[0] not in heads}
    if not by_name and not own <= state.keys():
        return
    known = {*whole.state_dict(), *body.state_dict()}
    parts = {key.partition(".")[0] for key in known} - heads
    left = [key for key in state if key not in known and key.partition(".")[0] in parts]
    if left:
        raise InputError(
            f"{file} does not fit the timm model: {len(left)} of its {len(state)} tensors have no "
            f"place in it ({shortened(left, 3)}); is it of another model?"
        )


def _tensors(body: nn.Module) -> dict[str, Tensor]:
    """Those that weights have; the counters of BN are no part of some."""
    state = body.state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _fingerprint(tensor: Tensor) -> tuple[int, float]:
    value = tensor.float() if tensor.is_floating_point() else tensor
    return value.numel(), value.double().sum().item()
