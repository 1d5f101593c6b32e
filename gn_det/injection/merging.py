"""Merging the norms in a graph of torch.fx with the ReLUs and additions behind them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from gn_det.injection.dataflow import is_unfused_norm
from gn_det.injection.source import expression
from gn_det.layers import FusedGroupNorm
from gn_det.layers.recomputation import recomputed
from gn_det.layers.weight_standardization import ConvWS1d, ConvWS2d, ConvWS3d
from gn_det.ops.form import Form
from gn_det.text import path_of

__all__ = ["Merging", "recompute_convolutions"]

_CONVOLUTIONS = {
    kind.forward
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, ConvWS1d, ConvWS2d, ConvWS3d)
}  # fmt: skip
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_NEW_RESULTS = {operator.add, operator.mul, torch.add, torch.mul, torch.cat}
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "ndimension"}


class Merging:
    """Merges the norms in a graph with what follows them, in place.

    Args:
        module: whose forward the graph records.
        graph: see :func:`gn_det.injection.dataflow.record`.

    Attributes:
        forms: what the norms that were merged compute in one call, by path.
        reasons: why others were not.
        ends_in: the norm whose result is the module's; None where there is none.
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
        is_norm = part is not None and is_unfused_norm(part)
        return is_norm and len(node.args) == 1 and not node.kwargs

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
            pair = (expression(path_of(node.target, name)) for node in (norm, second))
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
                for name, child in part.named_children() if is_unfused_norm(part) else ():
                    self.passed[path_of(node.target, name)] = child
            self._graph.erase_node(node)

    def _is_wide(self, node: fx.Node) -> bool:
        """Whether a result is a 1x1 convolution's that is not narrower than its input."""
        if node.op != "call_module" or len(node.users) != 1 or _is_merged(node):
            return False
        path = node.target.removesuffix(".convolved")
        conv = self._module.get_submodule(path)
        known = type(conv).forward in _CONVOLUTIONS or path != node.target
        plain = isinstance(conv, _ConvNd) and not isinstance(conv, nn.ConvTranspose2d)
        if not (known and plain) or set(conv.kernel_size) != {1} or conv.groups != 1:
            return False
        if conv.out_channels < conv.in_channels or is_parametrized(conv):
            return False  # a parametrization such as spectral norm may change at each call
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


def recompute_convolutions(graph: fx.Graph, convolutions: list[fx.Node]) -> None:
    """Let recomputation compute convolutions of a graph again."""
    for node in convolutions:
        with graph.inserting_before(node):
            convolution = graph.create_node("get_attr", node.target)
            call = graph.create_node("call_function", recomputed, (convolution, *node.args))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
