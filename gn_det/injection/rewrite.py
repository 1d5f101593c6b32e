"""Forwards in which a norm and what follows it are one call, generated from what a module does.

The record of a module (:mod:`gn_det.injection.dataflow`) shows what follows each norm's result. The
module then gets a subclass of its own class, of the same name, whose forward is the record with
those calls merged. The record is of the smallest module that sees both: fx on a whole detector
fails somewhere, and a recorded forward pass would show one run, not what every run does.

Before the generated forward runs, it checks what the record rests on (values that the module's
Python read, the kinds of the parts that it passes over, that nothing watches those); otherwise the
original forward runs.
"""

from __future__ import annotations

import copyreg
import inspect
import itertools
import linecache
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn

from gn_det.injection.dataflow import Record, is_unfused_norm, record, unfused_kind
from gn_det.injection.kinds import is_scripted
from gn_det.injection.merging import Merging, recompute_convolutions
from gn_det.injection.source import (
    attribute_checks,
    body,
    declared,
    equals,
    expression,
    input_checks,
    named,
)
from gn_det.injection.stand_in import UntraceableError
from gn_det.layers import FusedGroupNorm, FusedGroupNormAct
from gn_det.layers.conv_norm import ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d
from gn_det.layers.detectron2 import loaded_blocks
from gn_det.layers.watched import watched
from gn_det.layers.weight_standardization import ConvWSNorm1d, ConvWSNorm2d
from gn_det.ops.form import Form
from gn_det.text import path_of

__all__ = ["CONV_NORMS", "Plan", "Rewritten", "plan"]

CONV_NORMS = (ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d, ConvWSNorm1d, ConvWSNorm2d)
_UNKNOWN = "nobody calls it whose forward is known"

_NORMS = (FusedGroupNorm, FusedGroupNormAct)
# Methods besides forward that compute one: mmdetection's heads have one for a single level, and its
# recursive pyramid one of blocks.
_OTHER_FORWARDS = re.compile(r"forward_single|\w+_forward")
_MOST_OPTIONAL = 2  # of a forward's inputs, for all of which there are variants


class Rewritten:
    """What generated classes have in common; stands before the module's own class.

    Attributes:
        unfused_kind: the module's own class.
        fused_norms: what the norms below compute in one call, by their path in the module.
    """

    unfused_kind: ClassVar[type[nn.Module]]
    fused_norms: ClassVar[dict[str, Form]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: a registry that the module's own class has would take the generated one."""

    def forms(self) -> dict[str, Form]:
        """What the norms below compute in one call, by their path in the module."""
        return dict(self.fused_norms)

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickles and copies name the module's own class, and are rewritten anew."""
        function, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__ and arguments[0] is type(self):
            return _revived, (self.unfused_kind, *arguments[1:]), *state
        return function, arguments, *state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.__class__ = self.unfused_kind
        kind = plan(self).classes.get(self)
        if kind is not None:
            self.__class__ = kind


def _revived(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    generated = _subclass(kind, {})
    return generated.__new__(generated, *arguments)


class Plan(NamedTuple):
    """What rewriting would do.

    Attributes:
        classes: the class that each module gets.
        reasons: why a norm stays alone.
    """

    classes: dict[nn.Module, type[nn.Module]]
    reasons: dict[nn.Module, str]


def plan(model: nn.Module) -> Plan:
    """Find the norms of a model that a ReLU or an addition follows, and generate what merges them.

    Args:
        model: any model. It is not changed.
    """
    return _Planner(model).plan


class _Planner:
    def __init__(self, model: nn.Module) -> None:
        self.plan = Plan({}, {})
        blocks = loaded_blocks()
        handwritten = set(blocks.FUSED.values()) if blocks else set()
        # The norm whose result is a module's, by module.
        self._ends: dict[nn.Module, nn.Module | None] = {}
        for module in reversed([*model.modules()]):  # parts before those who hold them
            if is_unfused_norm(module):
                self._ends[module] = module
                self.plan.reasons.setdefault(module, _UNKNOWN)
            elif _is_conv_norm(module):
                self._ends[module] = module.norm
            elif type(module) in handwritten:
                for norm in module.modules():
                    if self.plan.reasons.get(norm) == _UNKNOWN:
                        self.plan.reasons[norm] = f"nothing follows it in {type(module).__name__}"
                for path in module.forms():
                    self.plan.reasons.pop(module.get_submodule(path), None)
            elif not is_scripted(module):
                self._visit(module)

    def _open_parts(self, module: nn.Module) -> Iterator[nn.Module]:
        """Parts that end in a norm, also in lists, which call nobody."""
        for part in module.children():
            if self._ends.get(part):
                yield part
            elif not is_scripted(part) and _has_no_forward(part):
                yield from self._open_parts(part)

    def _visit(self, module: nn.Module) -> None:
        parts = [*self._open_parts(module)]
        if not parts or _has_no_forward(module):
            return
        rewritings = []
        for method in _forwards_of(unfused_kind(module)):
            try:
                rewriting = self._rewriting(module, method)
            except UntraceableError as error:
                for norm in (self._ends[part] for part in parts if method == "forward"):
                    if norm in self.plan.reasons:
                        self.plan.reasons[norm] = f"{type(module).__name__}'s forward {error}"
                continue
            if method == "forward":
                for norm, reason in rewriting.reasons.items():
                    if norm in self.plan.reasons:
                        self.plan.reasons[norm] = reason
                if rewriting.ends_in is not None:
                    self._ends[module] = module.get_submodule(rewriting.ends_in)
            if rewriting.forms:
                rewritings.append(rewriting)
                for path in rewriting.forms:
                    self.plan.reasons.pop(module.get_submodule(path), None)
        if rewritings:
            self.plan.classes[module] = _generate(module, rewritings)

    def _rewriting(self, module: nn.Module, method: str) -> _Rewriting:
        """Of a module as it may be called: with more or fewer of its inputs, in both modes."""
        if method in vars(module):
            raise UntraceableError("is one of its own")
        if isinstance(module, fx.GraphModule):
            raise UntraceableError("is a recorded one already")
        forward = getattr(unfused_kind(module), method)
        optional = [
            name
            for name, each in [*inspect.signature(forward).parameters.items()][1:]
            if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is None
        ]
        variants, failed = [], []
        for count in range(len(optional) + 1 if len(optional) <= _MOST_OPTIONAL else 1):
            given = optional[:count]
            try:
                variants += self._in_both_modes(module, forward, given)
            except UntraceableError as error:
                failed.append(error)
        if not variants:
            raise failed[0]
        return _Rewriting(module, method, variants, complete=not failed)

    def _in_both_modes(
        self, module: nn.Module, forward: Callable, given: list[str]
    ) -> list[_Variant]:
        ends = {part for part, ends in self._ends.items() if ends and type(part) not in _NORMS}
        first = record(module, forward, ends.__contains__, given)
        mode = next((path for path, name in first.reads if name == "training"), None)
        if mode is None:
            return [_Variant(first, given, None, True)]
        read = {value for (_, name), value in first.reads.items() if name == "training"}
        # Norms too: their mode may be asked for, though they are not entered.
        modes = {part: part.training for part in module.modules()}
        found = []
        try:
            for training in (True, False):
                if read == {training}:
                    each = first
                else:
                    for part in modes:
                        part.training = training
                    each = record(module, forward, ends.__contains__, given)
                found.append(_Variant(each, given, mode, training))
        finally:
            for part, training in modes.items():
                part.training = training
        return found


class _Variant(NamedTuple):
    """A record of one way to call a module.

    Attributes:
        given: the inputs with a default that are given.
        mode_of: the part that was asked for its mode, by path; None if none was.
        training: the mode.
    """

    record: Record
    given: list[str]
    mode_of: str | None
    training: bool

    def condition(self, parameters: list[inspect.Parameter], names: dict[str, Any]) -> list[str]:
        """What tells this variant from the others, as TorchScript also reads it."""
        checks = []
        for each in parameters:
            if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is not each.empty:
                default = equals(each.name, each.default, names)
                checks.append(f"not ({default})" if each.name in self.given else default)
        if self.mode_of is not None:
            mode = expression(path_of(self.mode_of, "training"))
            checks.append(mode if self.training else f"not {mode}")
        return checks


class _Rewriting:
    """The records of a module's method with norms merged.

    Attributes:
        method: its name.
        forms: what its norms compute, by path.
        reasons: why others do not.
        ends_in: the norm whose result is the module's.
    """

    def __init__(
        self, module: nn.Module, method: str, variants: list[_Variant], complete: bool
    ) -> None:
        self.method = method
        self._variants, self._complete = variants, complete
        self.forms: dict[str, Form] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.ends_in: str | None = None
        self._passed: dict[str, nn.Module] = {}
        self._checks: dict[str, None] = {}
        self._wide: list[list[fx.Node]] = []
        for variant in variants:
            merging = Merging(module, variant.record.graph)
            self.forms |= merging.forms
            self.reasons |= merging.reasons
            self._passed |= merging.passed
            self._checks |= merging.checks
            self._wide.append(merging.wide)
            self.ends_in = self.ends_in or merging.ends_in
        for path in self.forms:
            self.reasons.pop(module.get_submodule(path), None)

    def source(self, kind: type[nn.Module], names: dict[str, Any]) -> str:
        """The method's code; what it refers to by name is added to names."""
        original = getattr(kind, self.method)
        names |= {"gn_det_original": original, "gn_det_watched": watched, "torch": torch}
        parameters = [*inspect.signature(original).parameters.values()][1:]
        signature, passed_on = declared(parameters, names)
        checks = [*input_checks(parameters, names), *self._part_checks(names)]
        conditions = [each.condition(parameters, names) for each in self._variants]
        records = [each.record for each in self._variants]
        holds = [
            " and ".join([*condition, *attribute_checks(each.reads, names)]) or "True"
            for condition, each in zip(conditions, records, strict=True)
        ]
        plain = [body(each.graph, names) for each in records]
        lines = [
            f"def {self.method}({', '.join(['self', *signature])}):",
            "    if not torch.jit.is_scripting():",
            f"        if not ({' and '.join([*checks, '(' + ' or '.join(holds) + ')'])}):",
            f"            return gn_det_original({', '.join(['self', *passed_on])})",
        ]
        if any(self._wide):
            for each, wide in zip(records, self._wide, strict=True):
                recompute_convolutions(each.graph, wide)
            expanded = [body(each.graph, names) for each in records]
            lines += ["    if torch.jit.is_scripting():"]
            lines += self._choice(conditions, plain, " " * 8)
            lines += ["    else:", *self._choice(conditions, expanded, " " * 8)]
        else:
            lines += self._choice(conditions, plain, "    ")
        return "\n".join(lines) + "\n"

    def _choice(
        self, conditions: list[list[str]], bodies: list[list[str]], indent: str
    ) -> list[str]:
        lines: list[str] = []
        for number, (condition, block) in enumerate(zip(conditions, bodies, strict=True)):
            if number == len(bodies) - 1 and self._complete:
                if not lines:
                    return [indent + line for line in block]
                lines.append(f"{indent}else:")
            else:
                lines.append(f"{indent}{'elif' if lines else 'if'} {' and '.join(condition)}:")
            lines += [f"{indent}    {line}" for line in block]
        if not self._complete:
            lines += [f"{indent}else:", f'{indent}    raise RuntimeError("not with these inputs")']
        return lines

    def _part_checks(self, names: dict[str, Any]) -> Iterator[str]:
        """That the parts are there which the record passes over, as they were."""
        entered: dict[str, nn.Module] = {}
        for each in self._variants:
            entered |= each.record.entered
        for path, part in entered.items():
            if path:
                kind = unfused_kind(part)
                yield f"isinstance({expression(path)}, {named(kind, names)})"
            children = expression(path_of(path, "_modules"))
            yield f"tuple({children}) == {tuple(part._modules)!r}"
            if None not in part._modules.values():
                yield f"None not in {children}.values()"
        for path, part in self._passed.items():
            yield f"type({expression(path)}) is {named(type(part), names)}"
            if type(part) in _NORMS:
                yield f"{expression(path_of(path, 'activation'))} is None"
        yield from self._checks
        parts = [path for path in {**entered, **self._passed} if path]
        yield f"not gn_det_watched([{', '.join(map(expression, parts))}])"


_generated: dict[tuple, type[nn.Module]] = {}
_numbers = itertools.count()


def _generate(module: nn.Module, rewritings: Sequence[_Rewriting]) -> type[nn.Module]:
    """The class with rewritten methods; modules of one class that compute the same share it."""
    kind = unfused_kind(module)
    key: tuple = (kind,)
    methods = []
    for each in rewritings:
        names: dict[str, Any] = {}
        source = each.source(kind, names)
        key += (source, tuple((name, id(value)) for name, value in sorted(names.items())))
        methods.append((each.method, source, names))
    if key not in _generated:
        members = {name: _method(kind, name, source, names) for name, source, names in methods}
        forms: dict[str, Form] = {}
        for each in reversed(rewritings):
            forms |= each.forms
        _generated[key] = _subclass(kind, {**members, "fused_norms": forms})
    return _generated[key]


def _method(kind: type[nn.Module], name: str, source: str, names: dict[str, Any]) -> Callable:
    """A method from its code. It keeps names, so that no id of a value is another's later."""
    filename = f"<gn_det: {kind.__qualname__} {next(_numbers)}>"
    exec(compile(source, filename, "exec"), names)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    method = names[name]
    method.__annotations__ = dict(getattr(getattr(kind, name), "__annotations__", {}))
    method.__module__ = __name__
    return method


def _subclass(kind: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A class of the same name, for which isinstance holds and repr says the same."""
    named = {"__module__": getattr(kind, "__module__", __name__), "__qualname__": kind.__qualname__}
    named["__doc__"] = kind.__doc__
    return type(kind)(kind.__name__, (Rewritten, kind), {**named, "unfused_kind": kind, **members})


def _forwards_of(kind: type[nn.Module]) -> list[str]:
    """Names of a class's methods that compute something from tensors, forward first."""
    own = [name for each in kind.__mro__ for name in vars(each) if each is not nn.Module]
    others = [
        name
        for name in dict.fromkeys(own)
        if _OTHER_FORWARDS.fullmatch(name) and inspect.isfunction(getattr(kind, name))
    ]
    return ["forward", *others]


def _is_conv_norm(module: nn.Module) -> bool:
    """Whether a module is a convolution of a known class that ends in a norm."""
    blocks = loaded_blocks()
    known = type(module) in CONV_NORMS or (blocks is not None and blocks.is_fused_conv(module))
    return known and is_unfused_norm(getattr(module, "norm", None))


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward
