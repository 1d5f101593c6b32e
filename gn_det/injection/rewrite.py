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
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from gn_det.injection.dataflow import (
    Record,
    UntraceableError,
    is_norm,
    path_of,
    record,
    unfused_forward,
)
from gn_det.layers import FusedGroupNorm, FusedGroupNormAct
from gn_det.layers.conv_norm import ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d
from gn_det.layers.detectron2 import loaded_blocks
from gn_det.layers.recomputation import recomputed
from gn_det.layers.weight_standardization import (
    ConvWS1d,
    ConvWS2d,
    ConvWS3d,
    ConvWSNorm1d,
    ConvWSNorm2d,
)
from gn_det.ops.form import Form

__all__ = ["CONV_NORMS", "Plan", "Rewritten", "plan"]

CONV_NORMS = (ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d, ConvWSNorm1d, ConvWSNorm2d)
_CONVOLUTIONS = {
    kind.forward
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, ConvWS1d, ConvWS2d, ConvWS3d)
}  # fmt: skip

_UNKNOWN = "nobody calls it whose forward is known"

_NORMS = (FusedGroupNorm, FusedGroupNormAct)
_MOST_OPTIONAL = 2  # of a forward's inputs, for all of which there are variants

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_NEW_RESULTS = {operator.add, operator.mul, torch.add, torch.mul, torch.cat}
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "ndimension"}


class Rewritten:
    """What generated classes have in common; stands before the module's own class.

    Attributes:
        unfused_kind: the module's own class.
        fused_norms: what the norms below compute in one call, by their path in the module.
    """

    unfused_kind: ClassVar[type[nn.Module]]
    fused_norms: ClassVar[dict[str, Form]] = {}

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
        self._ends: dict[nn.Module, bool] = {}  # whether a module's result is that of its norm
        for module in reversed([*model.modules()]):  # parts before those who hold them
            if is_norm(module):
                self._ends[module] = True
                self.plan.reasons.setdefault(module, _UNKNOWN)
            elif _is_conv_norm(module):
                self._ends[module] = True
            elif type(module) in handwritten:
                for norm in module.modules():
                    if self.plan.reasons.get(norm) == _UNKNOWN:
                        self.plan.reasons[norm] = f"nothing follows it in {type(module).__name__}"
                for path in module.forms():
                    self.plan.reasons.pop(module.get_submodule(path), None)
            else:
                self._visit(module)

    def _open_parts(self, module: nn.Module) -> Iterator[nn.Module]:
        """Parts that end in a norm, also in lists, which call nobody."""
        for part in module.children():
            if self._ends.get(part):
                yield part
            elif _has_no_forward(part):
                yield from self._open_parts(part)

    def _visit(self, module: nn.Module) -> None:
        parts = [*self._open_parts(module)]
        if not parts or _has_no_forward(module):
            return
        try:
            rewriting = self._rewriting(module)
        except UntraceableError as error:
            for part in parts:
                for norm in part.modules():
                    if norm in self.plan.reasons:
                        self.plan.reasons[norm] = f"{type(module).__name__}'s forward {error}"
            return
        for norm, reason in rewriting.reasons.items():
            if norm in self.plan.reasons:
                self.plan.reasons[norm] = reason
        self._ends[module] = rewriting.ends_in is not None
        if rewriting.forms:
            for path in rewriting.forms:
                self.plan.reasons.pop(module.get_submodule(path), None)
            self.plan.classes[module] = rewriting.generated()

    def _rewriting(self, module: nn.Module) -> _Rewriting:
        """Of a module as it may be called: with more or fewer of its inputs, in both modes."""
        if "forward" in vars(module):
            raise UntraceableError("is one of its own")
        if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
            raise UntraceableError("is a recorded one already")
        forward = unfused_forward(type(module))
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
        return _Rewriting(module, variants, complete=not failed)

    def _in_both_modes(
        self, module: nn.Module, forward: Callable, given: list[str]
    ) -> list[_Variant]:
        ends = {part for part, ends in self._ends.items() if ends and type(part) not in _NORMS}
        first = record(module, forward, ends.__contains__, given)
        mode = next((path for path, name in first.reads if name == "training"), None)
        if mode is None:
            return [_Variant(first, given, None, True)]
        modes = {part: part.training for part in first.entered.values()}
        found = []
        try:
            for training in (True, False):
                if {*modes.values()} == {training}:
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
                default = _is(each.name, each.default, names)
                checks.append(f"not ({default})" if each.name in self.given else default)
        if self.mode_of is not None:
            mode = _expression(path_of(self.mode_of, "training"))
            checks.append(mode if self.training else f"not {mode}")
        return checks


class _Rewriting:
    """A module's records with norms merged, and the class whose forward they are.

    Attributes:
        forms: what its norms compute, by path.
        reasons: why others do not.
        ends_in: the norm whose result is the module's.
    """

    def __init__(self, module: nn.Module, variants: list[_Variant], complete: bool) -> None:
        self._module, self._variants, self._complete = module, variants, complete
        self.forms: dict[str, Form] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.ends_in: str | None = None
        self._passed: dict[str, nn.Module] = {}
        self._checks: dict[str, None] = {}
        self._wide: list[list[fx.Node]] = []
        for variant in variants:
            merging = _Merging(module, variant.record.graph)
            self.forms |= merging.forms
            self.reasons |= merging.reasons
            self._passed |= merging.passed
            self._checks |= merging.checks
            self._wide.append(merging.wide)
            self.ends_in = self.ends_in or merging.ends_in
        for path in self.forms:
            self.reasons.pop(module.get_submodule(path), None)

    def generated(self) -> type[nn.Module]:
        """The class; modules of one class that compute the same share it."""
        kind = getattr(type(self._module), "unfused_kind", type(self._module))
        names: dict[str, Any] = {"gn_det_original": kind.forward, "gn_det_unwatched": _unwatched}
        source = self._source(kind, names)
        key = (kind, source, tuple((name, id(value)) for name, value in sorted(names.items())))
        if key not in _generated:
            filename = f"<gn_det: {kind.__qualname__} {next(_numbers)}>"
            exec(compile(source, filename, "exec"), names)
            linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
            forward = names["forward"]
            forward.__annotations__ = dict(getattr(kind.forward, "__annotations__", {}))
            forward.__module__ = __name__
            # names is kept with forward, so that no id of its values is another's later.
            _generated[key] = _subclass(kind, {"forward": forward, "fused_norms": self.forms})
        return _generated[key]

    def _source(self, kind: type[nn.Module], names: dict[str, Any]) -> str:
        parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
        declared, passed_on = _declared(parameters, names)
        checks = [*_input_checks(parameters, names), *self._part_checks(names)]
        conditions = [each.condition(parameters, names) for each in self._variants]
        records = [each.record for each in self._variants]
        holds = [
            " and ".join([*condition, *_attribute_checks(each.reads, names)]) or "True"
            for condition, each in zip(conditions, records, strict=True)
        ]
        plain = [_body(each.graph, names) for each in records]
        lines = [
            f"def forward({', '.join(['self', *declared])}):",
            "    if not torch.jit.is_scripting():",
            f"        if not ({' and '.join([*checks, '(' + ' or '.join(holds) + ')'])}):",
            f"            return gn_det_original({', '.join(['self', *passed_on])})",
        ]
        if any(self._wide):
            for each, wide in zip(records, self._wide, strict=True):
                _recompute(each.graph, wide)
            expanded = [_body(each.graph, names) for each in records]
            lines += ["    if torch.jit.is_scripting():"]
            lines += self._choice(conditions, plain, " " * 8)
            lines += ["    else:", *self._choice(conditions, expanded, " " * 8)]
        else:
            lines += self._choice(conditions, plain, "    ")
        names["torch"] = torch
        return "\n".join(lines) + "\n"

    def _choice(
        self, conditions: list[list[str]], bodies: list[list[str]], indent: str
    ) -> list[str]:
        lines: list[str] = []
        for number, (condition, body) in enumerate(zip(conditions, bodies, strict=True)):
            if number == len(bodies) - 1 and self._complete:
                if not lines:
                    return [indent + line for line in body]
                lines.append(f"{indent}else:")
            else:
                lines.append(f"{indent}{'elif' if lines else 'if'} {' and '.join(condition)}:")
            lines += [f"{indent}    {line}" for line in body]
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
                kind = getattr(type(part), "unfused_kind", type(part))
                yield f"isinstance({_expression(path)}, {_named(kind, names)})"
            yield f"tuple({_expression(path_of(path, '_modules'))}) == {tuple(part._modules)!r}"
        for path, part in self._passed.items():
            yield f"type({_expression(path)}) is {_named(type(part), names)}"
            if type(part) in _NORMS:
                yield f"{_expression(path_of(path, 'activation'))} is None"
        yield from self._checks
        watched = [path for path in {**entered, **self._passed} if path]
        yield f"gn_det_unwatched({', '.join(map(_expression, watched))})"


class _Merging:
    """Merges the norms in a graph with what follows them, in place.

    Attributes:
        forms, reasons, ends_in: as those of _Rewriting.
        passed: the parts that are not called as modules any more, by path.
        checks: Python expressions that have to hold, as keys.
        wide: calls of 1x1 convolutions that recomputation computes again.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._module, self._graph = module, graph
        self.forms: dict[str, Form] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.passed: dict[str, nn.Module] = {}
        self.checks: dict[str, None] = {}
        self.wide: list[fx.Node] = []
        self.ends_in: str | None = None
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        norms = [node for node in graph.nodes if self._is_norm_call(node)]
        for node in [*graph.nodes]:
            if (operands := _operands(node)) is not None:
                self._merge_addition(node, *operands)
        for node in norms:
            if node.graph is graph and not node._erased and self._is_norm_call(node):
                self._merge_relu(node)
        for node in norms:
            if not node._erased and self._is_norm_call(node) and node.target not in self.forms:
                self._explain(node)

    # What nodes are.

    def _part(self, node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            try:
                return self._module.get_submodule(node.target)
            except AttributeError:  # a method of a part
                return None
        return None

    def _is_norm_call(self, node: Any) -> bool:
        part = self._part(node)
        return part is not None and is_norm(part) and len(node.args) == 1 and not node.kwargs

    def _is_relu(self, node: fx.Node) -> bool:
        part = self._part(node)
        if part is not None:
            return isinstance(part, nn.ReLU) and type(part).forward is nn.ReLU.forward
        if node.op == "call_function":
            named = node.kwargs.keys() <= {"inplace", "input"}
            return node.target in _RELUS and named and len(node.all_input_nodes) == 1
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def _user(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """The only one who uses a result, and nn.Identity on the way there."""
        way: list[fx.Node] = []
        while True:
            users = [user for user in node.users if not _is_metadata(user)]
            if len(users) != 1 or _occurrences(node, users[0]) != 1:
                return None, way
            if type(self._part(users[0])) is not nn.Identity:
                return users[0], way
            node = users[0]
            way.append(node)

    def _norm_behind(self, node: Any, user: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
        """The norm whose result a user, and nobody else, gets as node."""
        way: list[fx.Node] = []
        while type(self._part(node)) is nn.Identity and len(node.args) == 1:
            way.append(node)
            node = node.args[0]
        if self._is_norm_call(node) and self._user(node)[0] is user:
            return node, way
        return None

    def _can_move(self, norm: fx.Node, to: fx.Node) -> bool:
        """Whether a norm's input is still the same where its result is added."""
        source = norm.args[0]
        between = [
            node
            for node, index in self._order.items()
            if self._order[norm] < index < self._order[to] and not node._erased
        ]
        users = {user for user in source.users if not _is_metadata(user)} - {norm}
        if users.intersection(between):  # gradients of the input would add up in another order
            return False
        if not users and source.op != "placeholder":
            part = self._part(source)
            fresh = (part is None and source.op == "call_module") or isinstance(part, _ConvNd)
            return fresh or not any(self._changes_in_place(node) for node in between)
        return all(self._is_pure(node) for node in between)

    def _changes_in_place(self, node: fx.Node) -> bool:
        part = self._part(node)
        if part is not None:
            return bool(getattr(part, "inplace", False))
        if node.op == "call_method":
            return node.target.endswith("_")
        name = getattr(node.target, "__name__", "")
        in_place = name.endswith("_") or bool(node.kwargs.get("inplace"))
        return in_place or name in ("iadd", "isub", "imul", "itruediv", "setitem")

    def _is_pure(self, node: fx.Node) -> bool:
        if self._changes_in_place(node):
            return False
        part = self._part(node)
        known = (_ConvNd, nn.GroupNorm, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)
        return part is None or isinstance(part, known)

    def _is_new(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a result is a tensor of its own, which only the user sees."""
        if [other for other in node.users if not _is_metadata(other)] != [user]:
            return False
        part = self._part(node)
        if isinstance(part, (_ConvNd, FusedGroupNorm)) or _is_merged(node):
            return True
        if node.op == "call_function":
            return node.target in _NEW_RESULTS
        # Another part may hand on what it was given.
        return part is not None and all(self._is_new(each, node) for each in node.all_input_nodes)

    # What becomes of them.

    def _merge_addition(self, add: fx.Node, left: Any, right: Any, in_place: bool) -> None:
        for ours, other, keeps in ((left, right, "x"), (right, left, "residual")):
            found = self._norm_behind(ours, add)
            if found is None or not isinstance(other, fx.Node) or other.op == "get_attr":
                continue
            norm, way = found
            if in_place and keeps == "residual" and not self._is_new(other, add):
                continue
            if self._can_move(norm, add):
                self._merge(add, norm, way, other, keeps if in_place else "")
                return

    def _merge(
        self, add: fx.Node, norm: fx.Node, way: list[fx.Node], other: fx.Node, keeps: str
    ) -> None:
        relu, behind = self._user(add)
        relu = relu if relu is not None and self._is_relu(relu) else None
        form = Form(relu=relu is not None, add=True)
        merged = [*way, norm]
        arguments = [norm.args[0], other, "relu" if relu is not None else None, keeps]
        second = self._norm_behind(other, add)
        if relu is not None and second is not None and self._share_a_call(norm, second[0], add):
            form = Form(relu=True, add=True, normalize_add=True)
            with self._graph.inserting_before(add):
                weight, bias = (
                    self._graph.create_node("get_attr", f"{second[0].target}.{name}")
                    for name in ("weight", "bias")
                )
            arguments = [norm.args[0], second[0].args[0], "relu", keeps, True, weight, bias]
            merged += [*second[1], second[0]]
            self.forms[second[0].target] = form
        with self._graph.inserting_before(add):
            call = self._graph.create_node(
                "call_module", f"{norm.target}.normalize_and_add", tuple(arguments)
            )
        self._order[call] = self._order[add]
        self.forms[norm.target] = form
        sources = [node.args[0] for node in merged if self._is_norm_call(node)]
        end = relu if relu is not None else add
        end.replace_all_uses_with(call)
        self._drop([end, *(reversed(behind) if relu is not None else ())])
        if relu is not None:
            self._drop([add])
        for node in (norm, *([second[0]] if form.normalize_add else ())):
            self._read_metadata_before(node)
        self._drop(merged)
        if form.relu:
            self.wide += [node for node in sources if self._is_wide(node)]

    def _share_a_call(self, norm: fx.Node, second: fx.Node, add: fx.Node) -> bool:
        one, two = self._part(norm), self._part(second)
        same = one is not two and (one.num_groups, one.eps) == (two.num_groups, two.eps)
        if not (same and one.affine and two.affine and self._can_move(second, add)):
            return False
        for name in ("num_groups", "eps"):
            pair = (_expression(path_of(node.target, name)) for node in (norm, second))
            self.checks[" == ".join(pair)] = None
        return True

    def _merge_relu(self, norm: fx.Node) -> None:
        relu, way = self._user(norm)
        if relu is None or not self._is_relu(relu):
            return
        with self._graph.inserting_before(norm):
            call = self._graph.create_node(
                "call_module", f"{norm.target}.normalize", (norm.args[0], "relu")
            )
        self.forms[norm.target] = Form(relu=True)
        self._read_metadata_before(norm)
        relu.replace_all_uses_with(call)
        self._drop([relu, *reversed(way), norm])

    def _read_metadata_before(self, norm: fx.Node) -> None:
        """Shape and dtype of a norm's result are those of its input."""
        for user in [*norm.users]:
            if _is_metadata(user):
                user.replace_input_with(norm, norm.args[0])

    def _drop(self, nodes: Any) -> None:
        for node in nodes:
            part = self._part(node)
            if part is not None:
                self.passed[node.target] = part
                for name, child in part.named_children() if is_norm(part) else ():
                    self.passed[path_of(node.target, name)] = child
            self._graph.erase_node(node)

    def _is_wide(self, node: fx.Node) -> bool:
        """Whether a result is a 1x1 convolution's that is not narrower than its input."""
        if node.op != "call_module" or len(node.users) != 1:
            return False
        path = node.target.removesuffix(".convolved")
        conv = self._module.get_submodule(path)
        known = type(conv).forward in _CONVOLUTIONS or path != node.target
        plain = isinstance(conv, _ConvNd) and not isinstance(conv, nn.ConvTranspose2d)
        if not (known and plain) or set(conv.kernel_size) != {1} or conv.groups != 1:
            return False
        if conv.out_channels < conv.in_channels:
            return False
        self.passed[path] = conv
        return True

    def _explain(self, norm: fx.Node) -> None:
        user, way = self._user(norm)
        if user is None:
            count = sum(not _is_metadata(each) for each in norm.users)
            reason = f"its result is used {count} times" if count else "its result is not used"
        elif user.op == "output":
            reason = "nothing follows it in the model's forward"
            if user.args[0] is (way[-1] if way else norm):
                self.ends_in = norm.target
                reason = "what follows it is outside the model, or in a forward that is not known"
        elif _is_merged(user):
            reason = "the norm that it is added to takes in the addition"
        elif _operands(user) is not None:
            reason = "what it is added to may be changed in between, or seen by others"
        else:
            part = self._part(user)
            what = type(part).__name__ if part is not None else user.target
            reason = f"{getattr(what, '__name__', what)} follows"
        self.reasons[self._part(norm)] = reason


def _operands(node: fx.Node) -> tuple[Any, Any, bool] | None:
    """What a node adds, left and right, and whether it does so in place; None if it does not."""
    arguments = [*node.args]
    if node.op == "call_function" and node.target in _ADDITIONS:
        in_place = node.target is operator.iadd
    elif node.op == "call_method" and node.target in ("add", "add_"):
        in_place = node.target == "add_"
    else:
        return None
    named = dict(node.kwargs)
    if named.pop("alpha", 1) != 1:
        return None
    arguments += [named.pop(name) for name in ("input", "other") if name in named]
    return (*arguments, in_place) if len(arguments) == 2 and not named else None


def _is_metadata(node: fx.Node) -> bool:
    """Whether a node asks a tensor for what a norm does not change."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


def _is_merged(node: fx.Node) -> bool:
    return node.op == "call_module" and node.target.endswith(".normalize_and_add")


def _occurrences(node: fx.Node, user: fx.Node) -> int:
    found = []
    fx.node.map_arg((user.args, user.kwargs), lambda each: found.append(each) or each)
    return found.count(node)


def _recompute(graph: fx.Graph, convolutions: list[fx.Node]) -> None:
    for node in convolutions:
        with graph.inserting_before(node):
            convolution = graph.create_node("get_attr", node.target)
            call = graph.create_node("call_function", recomputed, (convolution, *node.args))
        node.replace_all_uses_with(call)
        graph.erase_node(node)


# How it is written down.

_generated: dict[tuple, type[nn.Module]] = {}
_numbers = itertools.count()


def _subclass(kind: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A class of the same name, for which isinstance holds and repr says the same."""
    named = {"__module__": getattr(kind, "__module__", __name__), "__qualname__": kind.__qualname__}
    named["__doc__"] = kind.__doc__
    return type(kind)(kind.__name__, (Rewritten, kind), {**named, "unfused_kind": kind, **members})


def _expression(path: str) -> str:
    """``self`` and a path, as Python has to write it."""
    text = "self"
    for name in path.split(".") if path else ():
        text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {name!r})"
    return text


def _named(value: Any, names: dict[str, Any]) -> str:
    """A name for a value among the generated function's globals."""
    for name, known in names.items():
        if known is value:
            return name
    name = f"gn_det_known_{len(names)}"
    names[name] = value
    return name


def _body(graph: fx.Graph, names: dict[str, Any]) -> list[str]:
    code = graph.python_code("self")
    for name, value in code.globals.items():
        if names.setdefault(name, value) is not value:
            raise UntraceableError(f"calls two functions of the name {name}")
    lines = code.src.strip().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("def forward("))
    return [line[4:] for line in lines[start + 1 :] if line.strip()]


def _declared(
    parameters: list[inspect.Parameter], names: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """A signature as that of the original, and the arguments that hand everything on to it."""
    declared, passed_on, starred = [], [], False
    for each in parameters:
        if each.kind is each.VAR_POSITIONAL:
            declared.append(f"*{each.name}")
            passed_on.append(f"*{each.name}")
            starred = True
        elif each.kind is each.VAR_KEYWORD:
            declared.append(f"**{each.name}")
            passed_on.append(f"**{each.name}")
        else:
            if each.kind is each.KEYWORD_ONLY and not starred:
                declared.append("*")
                starred = True
            default = "" if each.default is each.empty else f"={_value(each.default, names)}"
            declared.append(f"{each.name}{default}")
            named = f"{each.name}={each.name}"
            passed_on.append(named if each.kind is each.KEYWORD_ONLY else each.name)
    return declared, passed_on


def _input_checks(parameters: list[inspect.Parameter], names: dict[str, Any]) -> Iterator[str]:
    """That inputs are there, and none that no variant has."""
    for each in parameters:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            yield f"not {each.name}"
        elif each.default is each.empty:
            yield f"{each.name} is not None"
        elif each.kind is each.KEYWORD_ONLY:
            yield _is(each.name, each.default, names)


def _attribute_checks(reads: dict[tuple[str, str], Any], names: dict[str, Any]) -> list[str]:
    """That what the record's Python read is what it was."""
    checks = []
    for (path, name), value in reads.items():
        if isinstance(value, (nn.Module, torch.Tensor)):
            continue
        expression = _expression(path_of(path, name))
        if isinstance(value, (list, tuple, dict)) and _literal(value) is None:
            checks.append(f"len({expression}) == {len(value)}")
        else:
            checks.append(_is(expression, value, names))
    return checks


def _is(expression: str, value: Any, names: dict[str, Any]) -> str:
    identical = value is None or isinstance(value, bool) or _literal(value) is None
    return f"{expression} {'is' if identical else '=='} {_value(value, names)}"


def _value(value: Any, names: dict[str, Any]) -> str:
    literal = _literal(value)
    return _named(value, names) if literal is None else literal


def _literal(value: Any) -> str | None:
    """A value as Python writes it; None where it cannot."""
    if type(value) in (list, tuple, dict):
        parts = [*value.keys(), *value.values()] if type(value) is dict else value
        return repr(value) if all(_literal(part) is not None for part in parts) else None
    if type(value) is float and value - value != 0:  # infinite, or no number
        return None
    return repr(value) if value is None or type(value) in (bool, int, float, str) else None


def _unwatched(*parts: nn.Module) -> bool:
    """Whether parts need not be called one by one: nothing watches or replaces what they do."""
    return not torch.nn.modules.module._has_any_global_hook() and not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in vars(part)
        for part in parts
    )


def _is_conv_norm(module: nn.Module) -> bool:
    """Whether a module is a convolution of a known class that ends in a norm."""
    blocks = loaded_blocks()
    known = type(module) in CONV_NORMS or (blocks is not None and blocks.is_fused_conv(module))
    return known and is_norm(getattr(module, "norm", None))


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward
