"""What a module's forward does with its parts, recorded with torch.fx without running it.

fx runs the module's own Python once, with stand-ins for tensors. What it cannot see, this tracer
refuses with :class:`UntraceableError`: forwards that decide by data or by the type of an input,
make tensors, draw random numbers, set attributes, or switch gradients or autocast. What the Python
read from modules on the way is kept, so that the record holds only while those values do.
"""

from __future__ import annotations

import ast
import builtins
import copy
import dis
import gc
import inspect
import linecache
import operator
import random
import sys
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from gn_det.layers import FusedGroupNorm, FusedGroupNormAct

__all__ = ["Record", "UntraceableError", "path_of", "record"]


class UntraceableError(BaseException):
    """Why a module's forward cannot be recorded; the message goes on from "its forward".

    It is no Exception, so that no handler in the forward takes it for one of its own.
    """


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
        given: inputs that are given though they have a default; others take theirs.
        enters: whether to look into a part. A part that ends in ``convolved`` and ``norm``, as
            gn_det's convolutions with a norm do, is recorded as these two.

    Raises:
        UntraceableError: forward has no record that would hold.
    """
    with _ONE_AT_A_TIME:
        return _record(root, _Tracer(root, forward, enters, given))


# While one thread records, PyTorch's and Python's functions are others for all.
_ONE_AT_A_TIME = threading.RLock()


def _record(root: nn.Module, tracer: _Tracer) -> Record:
    drawn = _random_states()
    try:
        with warnings.catch_warnings(), tracer.watching():
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
    return Record(graph, tracer.entered, tracer.reads)


def path_of(path: str, name: str) -> str:
    """The path of a part."""
    return f"{path}.{name}" if path else name


# What nn.Module itself keeps, besides the mode.
_INTERNAL = vars(nn.Module()).keys() - {"training"}

# Whose backward pass a record of its forward would lose.
_AUTOGRAD_FUNCTION = "calls an autograd.Function"
_CALL_OF_MODULES = nn.Module._call_impl.__code__

# A record does not show calls of these. A forward that calls one is refused, PyTorch's own apart.
_UNSEEN = {
    "asks torch.is_grad_enabled": (torch, "is_grad_enabled"),
    "asks torch.is_autocast_enabled": (torch, "is_autocast_enabled"),
    "asks torch.is_inference_mode_enabled": (torch, "is_inference_mode_enabled"),
    "asks torch.compiler.is_compiling": (torch.compiler, "is_compiling"),
    "asks torch.onnx.is_in_onnx_export": (torch.onnx, "is_in_onnx_export"),
    "asks for its parameters": (nn.Module, "named_parameters"),
    "asks for its buffers": (nn.Module, "named_buffers"),
    "asks torch.jit.is_tracing": (torch.jit, "is_tracing"),
    "switches autocast": (torch.autocast, "__enter__"),
    "switches gradients off": (torch.no_grad, "__enter__"),
    "switches gradients on": (torch.enable_grad, "__enter__"),
    "switches gradients": (torch.set_grad_enabled, "__init__"),
    "switches to inference": (torch.inference_mode, "__enter__"),
    "switches cuDNN": (torch.backends.cudnn, "flags"),
    "changes what is kept for the backward pass": (
        torch.autograd.graph.saved_tensors_hooks,
        "__enter__",
    ),
    _AUTOGRAD_FUNCTION: (torch.autograd.Function, "apply"),
}

# Those of PyTorch that call these on the way to a stand-in.
_PYTORCHS = {
    "torch.fx._symbolic_trace",
    "torch.fx.proxy",
    "torch.fx.node",
    "torch.amp.autocast_mode",
}

_CONTAINERS = (list, dict, set, deque)  # that a forward may change

_IN_PLACE = (
    "__iadd__ __isub__ __imul__ __imatmul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ "
    "__iand__ __ior__ __ixor__ __ilshift__ __irshift__"
)


_ASKS_TYPE = "asks what type an input or a result has"


def _of_others(frame: FrameType) -> set[str]:
    """The names in a frame's code; PyTorch's own asks as well, and takes a stand-in as it is."""
    ours = frame.f_globals.get("__name__", "").startswith(("torch.fx", "torch.overrides"))
    return set() if ours else {*frame.f_code.co_names}


def _may_go_without(frame: FrameType) -> bool:
    """Whether a frame asks for an attribute by hasattr or getattr, or where it may be missing."""
    calls = dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("CALL", "PRECALL"))
    names = _of_others(frame)
    return bool(names & {"AttributeError", "Exception"}) or (
        calls and bool(names & {"hasattr", "getattr"})
    )


def _check_code(forward: Callable) -> None:
    """Refuse what shows in the code of a forward alone."""
    if getattr(forward, "_torchdynamo_disable", False):
        raise UntraceableError("is kept from torch.compile")
    code = getattr(inspect.unwrap(forward), "__code__", None)
    inputs = code.co_varnames[1 : code.co_argcount] if code is not None else ()
    for one, then in pairwise(dis.get_instructions(code) if code is not None else ()):
        if one.opname == "LOAD_GLOBAL" and one.argval == "type" and then.argval in inputs:
            raise UntraceableError(_ASKS_TYPE)


class _StandIn(fx.Proxy):
    """A stand-in for a tensor, or for whatever an input or a part's result is."""

    @property
    def __class__(self) -> type:
        if _of_others(sys._getframe(1)) & {"isinstance", "type"}:
            raise UntraceableError(_ASKS_TYPE)
        return _StandIn

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name) and _may_go_without(sys._getframe(1)):
            raise UntraceableError(f"asks whether an input or a result has {name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise UntraceableError(f"sets {name} of an input or a result")
        super().__setattr__(name, value)

    def __bool__(self) -> bool:
        if (test := _asserted(sys._getframe(1))) is None:
            return super().__bool__()
        self.tracer.create_proxy("call_function", torch._assert, (self, test), {})
        return True

    def __index__(self) -> int:
        raise UntraceableError("counts by the values of tensors, or how many there are")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _asserted(frame: FrameType) -> str | None:
    """What a frame is about to assert, where each of its parts has to hold; None if nothing."""
    for line, end, test in _assertions(frame.f_code.co_filename):
        if line <= frame.f_lineno <= end:
            return test
    return None


@cache
def _assertions(filename: str) -> list[tuple[int, int, str]]:
    """First and last line of assertions in a file, and what they assert."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return []
    return [
        (node.lineno, node.end_lineno or node.lineno, ast.unparse(node.test))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and all(map(_holds_whole, ast.walk(node.test)))
    ]


# In an assertion: where the whole holds, so does each condition in it. Not so for `or`, nor where
# Python compares one after the other, as in `x.dim() in (3, 4)`.
_CONJUNCTIONS = (
    ast.And, ast.BoolOp, ast.Compare, ast.Eq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.BinOp, ast.operator, ast.UnaryOp, ast.USub, ast.Subscript, ast.Slice,
    ast.Attribute, ast.Name, ast.Constant, ast.Load,
)  # fmt: skip
_SIZES = {"len", "size", "dim", "ndimension", "numel"}


def _holds_whole(node: ast.AST) -> bool:
    """Whether all conditions of an assertion hold where it does, by a part of it."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in _SIZES
    return isinstance(node, _CONJUNCTIONS)


def _length(count: Callable) -> Callable:
    """Len that also takes stand-ins."""

    def length(sized: Any) -> Any:
        if type(sized) is _StandIn:
            return sized.tracer.create_proxy("call_function", count, (sized,), {})
        return count(sized)

    return length


def _in_place(name: str) -> Callable[[_StandIn, Any], fx.Proxy]:
    function = getattr(operator, name)

    def record_it(self: _StandIn, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record_it


for _name in _IN_PLACE.split():  # fx has no stand-in for these: they would become y = y + x
    setattr(_StandIn, _name, _in_place(_name))


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
        self.reads: dict[tuple[str, str], Any] = {}
        self._paths = {module: path for path, module in root.named_modules()}
        self._forward, self._enters, self._given = forward, enters, given
        self._stand_ins: list[weakref.ref] = []
        self._functions = {
            kind.forward.__code__
            for kind in _subclasses(torch.autograd.Function)
            if inspect.isfunction(kind.forward)
        }
        self._states: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: dict | None = None
    ) -> tuple[Callable, list]:
        _check_code(self._forward)
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
                raise UntraceableError(_AUTOGRAD_FUNCTION)
            frame = frame.f_back
        return super().create_proxy(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        stand_in = _StandIn(node, self)
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
        if type(a) is _StandIn:
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            raise UntraceableError("makes a tensor of its own")
        if isinstance(a, (dict, list)) and type(a) not in (dict, list):
            raise UntraceableError(f"makes a {type(a).__name__}")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if m not in self._paths:
            raise UntraceableError(f"calls a {type(m).__name__} that is none of its parts")
        path = self._paths[m]
        if not self._enters(m):
            return self.create_proxy("call_module", path, args, kwargs)
        self.entered[path] = m
        if hasattr(m, "convolved"):
            convolved = self.create_proxy("call_module", path_of(path, "convolved"), args, kwargs)
            return self.create_proxy("call_module", self._paths[m.norm], (convolved,), {})
        if "forward" in vars(m):
            raise UntraceableError(f"calls {path}, which has a forward of its own")
        _check_code(unfused_kind(m).forward)
        return unfused_kind(m).forward(m, *args, **kwargs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what this thread reads from modules meanwhile, and let it set nothing."""
        thread, plain = threading.get_ident(), object.__getattribute__
        set_attribute = nn.Module.__setattr__

        def read(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            own = name not in _INTERNAL and name in plain(module, "__dict__")
            if own and threading.get_ident() == thread and module in self._paths:
                where = self._paths[module], name
                self.reads.setdefault(where, _copy(value))
                if _has_state(value) and where not in self._states:
                    self._states[where] = value, {k: _copy(v) for k, v in vars(value).items()}
            return value

        def refuse(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == thread:
                raise UntraceableError(f"sets {name}")
            set_attribute(module, name, value)

        def refused(function: Callable, why: str) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                caller = sys._getframe(1).f_globals.get("__name__", "")
                if threading.get_ident() == thread and caller not in _PYTORCHS:
                    raise UntraceableError(why)
                if of_classes:
                    kind, *args = args
                    return function.__get__(None, kind)(*args, **kwargs)
                return function(*args, **kwargs)

            of_classes = "classmethod" in type(function).__name__
            return classmethod(call) if of_classes else call

        unseen = [(why, *where, vars(where[0]).get(where[1])) for why, where in _UNSEEN.items()]
        count = builtins.len
        builtins.len = _length(count)
        nn.Module.__getattribute__, nn.Module.__setattr__ = read, refuse
        for why, owner, name, function in unseen:
            setattr(owner, name, refused(function or getattr(owner, name), why))
        try:
            yield
        finally:
            builtins.len = count
            del nn.Module.__getattribute__
            nn.Module.__setattr__ = set_attribute
            for _, owner, name, function in unseen:
                if function is None:  # what torch.backends.cudnn passes on to another module
                    delattr(owner, name)
                else:
                    setattr(owner, name, function)
            changed = [
                where for where, value in self.reads.items() if self._restored(*where, value)
            ]
            for where, (value, before) in self._states.items():
                if not _is_as_before(value, before):
                    vars(value).update(before)
                    changed.append(where)
        if changed:
            raise UntraceableError(f"changes {path_of(*changed[0])}")

    def _restored(self, path: str, name: str, value: Any) -> bool:
        """Whether a list or a dict was changed meanwhile; it is put back."""
        now = vars(self.root.get_submodule(path))[name]
        if not isinstance(value, _CONTAINERS) or now == value:
            return False
        now.clear()
        (now.extend if isinstance(value, (list, deque)) else now.update)(value)
        return True


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


def _has_state(value: Any) -> bool:
    """Whether a value is an object that code may change, and neither a module nor a tensor."""
    stateless = (nn.Module, torch.Tensor, type, FunctionType, ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, stateless)


def _is_as_before(value: Any, before: dict[str, Any]) -> bool:
    """Whether the public attributes that an object had are the same; others are caches."""

    def items(each: Any) -> Any:
        return [*map(id, each)] if isinstance(each, _CONTAINERS) else id(each)

    now = vars(value)
    public = {key: each for key, each in before.items() if not key.startswith("_")}
    return all(key in now and items(now[key]) == items(each) for key, each in public.items())


def _copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


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
