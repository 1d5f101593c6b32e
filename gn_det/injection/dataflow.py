"""What a module's forward does with its parts, recorded with torch.fx without running it.

fx runs the module's own Python once, with stand-ins for tensors. What it cannot see, this tracer
refuses with :class:`UntraceableError`: forwards that decide by data or by the type of an input,
make tensors, draw random numbers, set attributes, or switch gradients or autocast. What the Python
read from modules on the way is kept, so that the record holds only while those values do.
"""

from __future__ import annotations

import gc
import inspect
import random
import sys
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from gn_det.injection.stand_in import StandIn, UntraceableError, check_code
from gn_det.injection.watch import AUTOGRAD_FUNCTION, Watch
from gn_det.layers import FusedGroupNorm, FusedGroupNormAct
from gn_det.text import path_of

__all__ = ["Record", "is_unfused_norm", "record", "unfused_kind"]


class Record(NamedTuple):
    """What one run of a module's forward does.

    Attributes:
        graph: calls of parts, of functions and of methods. Parts that were entered are not in it,
            what they call is.
        entered: the modules whose own Python ran, by their path in the module: "" for itself.
        reads: what they hold besides modules and tensors, and was read: by path and name.
    """

    graph: fx.Graph
    entered: dict[str, nn.Module]
    reads: dict[tuple[str, str], Any]


def record(
    root: nn.Module, forward: Callable, enters: Callable[[nn.Module], bool], given: Container[str]
) -> Record:
    """Record a forward of a module.

    Args:
        root: it is not changed, and nothing is computed.
        forward: a function of root and of tensors.
        enters: whether to look into a part. A part that ends in ``convolved`` and ``norm``, as
            gn_det's convolutions with a norm do, is recorded as these two.
        given: inputs that are given though they have a default; others take theirs.

    Raises:
        UntraceableError: forward has no record that would hold.
    """
    with _ONE_AT_A_TIME:
        return _record(root, _Tracer(root, forward, enters, given))


# While one thread records, PyTorch's and Python's functions are others for all.
_ONE_AT_A_TIME = threading.RLock()


def _record(root: nn.Module, tracer: _Tracer) -> Record:
    drawn, watch = _random_states(), Watch(root, tracer.paths)
    try:
        with warnings.catch_warnings(), watch.running():
            warnings.simplefilter("ignore")
            graph = tracer.trace(root)
        if tracer.alive():
            gc.collect()  # what is left in cycles is kept by nobody
        if tracer.take_back():
            raise UntraceableError("keeps an input or a result for later")
        if _random_states() != drawn:
            raise UntraceableError("draws random numbers")
    except fx.proxy.TraceError as error:
        raise UntraceableError("decides by the values of tensors, or how many there are") from error
    except Exception as error:  # whatever other people's code does with a stand-in
        text = str(error).partition("\n")[0]
        kind = type(error).__name__
        raise UntraceableError(f"takes no stand-in for a tensor ({kind}: {text})") from error
    finally:
        if _random_states() != drawn:
            _restore(drawn)
        tracer.take_back()
    return Record(graph, tracer.entered, watch.reads)


_CALL_OF_MODULES = nn.Module._call_impl.__code__


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self,
        root: nn.Module,
        forward: Callable,
        enters: Callable[[nn.Module], bool],
        given: Container[str],
    ) -> None:
        super().__init__()
        self.entered = {"": root}
        self.paths = {module: path for path, module in root.named_modules()}
        self._forward, self._enters, self._given = forward, enters, given
        self._stand_ins: list[weakref.ref] = []
        self._functions = {
            kind.forward.__code__
            for kind in _subclasses(torch.autograd.Function)
            if inspect.isfunction(kind.forward)
        }

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: dict | None = None
    ) -> tuple[Callable, list]:
        check_code(self._forward)
        arguments = [self.root]
        for parameter in [*inspect.signature(self._forward).parameters.values()][1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is parameter.empty or parameter.name in self._given:
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise UntraceableError(f"wants {parameter.name} by name")
                arguments.append(self.create_proxy("placeholder", parameter.name, (), {}))
        return self._forward, arguments

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _CALL_OF_MODULES:
            if frame.f_code in self._functions:  # whose apply has another name
                raise UntraceableError(AUTOGRAD_FUNCTION)
            frame = frame.f_back
        return super().create_proxy(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        stand_in = StandIn(node, self)
        self._stand_ins.append(weakref.ref(stand_in))
        return stand_in

    def alive(self) -> list[fx.Proxy]:
        """The stand-ins that somebody has."""
        return [each for ref in self._stand_ins if (each := ref()) is not None]

    def take_back(self) -> bool:
        """Take stand-ins from lists and dicts that a forward left them in; whether there were.

        By the methods of the types themselves: classes of others may refuse to lose an item.
        """
        kept = self.alive()
        if not kept:
            return False
        theirs = {id(each) for each in kept}
        for holder in gc.get_referrers(*kept):
            if isinstance(holder, (list, deque)) and holder is not kept:
                base = list if isinstance(holder, list) else deque
                rest = [each for each in base.__iter__(holder) if id(each) not in theirs]
                base.clear(holder)
                base.extend(holder, rest)
            elif isinstance(holder, dict):
                base = OrderedDict if isinstance(holder, OrderedDict) else dict
                for key in [key for key, value in base.items(holder) if id(value) in theirs]:
                    base.__delitem__(holder, key)
        return True

    def create_arg(self, a: Any) -> Any:
        if type(a) is StandIn:
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            raise UntraceableError("makes a tensor of its own")
        if isinstance(a, (dict, list)) and type(a) not in (dict, list):
            raise UntraceableError(f"makes a {type(a).__name__}")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if m not in self.paths:
            raise UntraceableError(f"calls a {type(m).__name__} that is none of its parts")
        path = self.paths[m]
        if not self._enters(m):
            return self.create_proxy("call_module", path, args, kwargs)
        self.entered[path] = m
        if hasattr(m, "convolved"):
            convolved = self.create_proxy("call_module", path_of(path, "convolved"), args, kwargs)
            return self.create_proxy("call_module", self.paths[m.norm], (convolved,), {})
        if "forward" in vars(m):
            raise UntraceableError(f"calls {path}, which has a forward of its own")
        check_code(unfused_kind(m).forward)
        return unfused_kind(m).forward(m, *args, **kwargs)


def unfused_kind(module: nn.Module) -> type[nn.Module]:
    """A module's own class, which :func:`gn_det.fuse` may have put a generated one before."""
    return getattr(type(module), "unfused_kind", type(module))


def is_unfused_norm(module: nn.Module) -> bool:
    """Whether a module is a FusedGroupNorm that computes no ReLU and no addition."""
    if type(module) is FusedGroupNormAct:
        return module.activation is None and type(module.drop) is type(module.act) is nn.Identity
    return type(module) is FusedGroupNorm and module.activation is None


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    each: type[Any]
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _random_states() -> tuple:
    with _disable_current_modes():  # no fake tensors
        drawn = tuple(torch.get_rng_state().tolist())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), drawn
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), drawn, (name, tuple(keys.tolist()), *rest)


def _restore(states: tuple) -> None:
    python, drawn, *numpys = states
    random.setstate(python)
    with _disable_current_modes():
        torch.set_rng_state(torch.tensor(drawn, dtype=torch.uint8))
    for state in numpys:
        sys.modules["numpy"].random.set_state(state)
