"""Evaluate a graph of ATen operations under the rules of low precision: what lower_velocity traces.

In half precision products of matrices are low; elementwise and moving operations take the widest dtype among their
operands; complex numbers, sums, and whatever operator_table.py does not know are float32. In float16 products of
entries are float32 too, for its range. An overflow of finite operands becomes NaN, and no later operation hides it;
infinities in the user's data stay infinities.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from rampde_fx.errors import UnsupportedVelocityError
from rampde_fx.ir import graphs, named_arguments, operator_table
from rampde_fx.ir.named_arguments import MASKS, STATISTICS, TOLD
from rampde_fx.ir.operator_table import properties
from rampde_fx.torch_private import fake_tensors

HALF = (torch.float16, torch.bfloat16)
COMPLEX = "complex: fp32"
NO_KERNEL = "no kernel in low precision takes heads of this size: fp32"
UNKNOWN = "sums, or is not known to be safe in low precision: fp32"
ops = torch.ops.rampde_fx


def is_half(value: Any) -> bool:
    """Whether a value is a tensor in half precision."""
    return isinstance(value, torch.Tensor) and value.dtype in HALF


class Lowering(fx.Interpreter):
    """Runs a velocity under these rules; traced, it writes the lowered graph.

    Args:
        velocity: The graph.
        dtype: The dtype of its products.
        varies: For each input whether it depends on a state. Those are cast to the dtype where they enter; parameters
            and times are not where operations in float32 alone, or scalings by a 0-d value, read them.
    """

    def __init__(self, velocity: fx.GraphModule, dtype: torch.dtype, varies: Sequence[bool]) -> None:
        super().__init__(velocity)
        self.dtype = dtype
        read_wide = find_read_wide(velocity, dtype)
        compared = {node for node in velocity.graph.nodes if any(map(discretises, node.users))}
        self.feeds_wide = {node for node in read_wide | compared if _follows_readers(node, dtype)}
        inputs = zip(graphs.placeholders(velocity), varies, strict=True)
        self.enters_low = [varied or (_is_array(node) and node not in read_wide) for node, varied in inputs]
        self.wide: Counter[tuple[str, str]] = Counter()
        self.low = 0  # operations that were evaluated in the dtype
        self.hidden: list[torch.Tensor] = []  # whether a NaN, or an overflow, might not show in the results
        self.finite: set[fx.Node] = set()  # what is never infinite
        self.handles_nan = dtype is torch.float16 and any(map(_handles_nan, velocity.graph.nodes))
        self.current: fx.Node | None = None

    def evaluate(self, *args: Any) -> tuple[Any, ...]:
        """The outputs in their original dtypes, from inputs in theirs."""
        self.wide.clear()
        self.hidden.clear()
        self.low = 0
        entered = [
            self._cast(value, self.dtype) if low else value for value, low in zip(args, self.enters_low, strict=True)
        ]
        values = self.run(*entered)
        originals = [graphs.value(node) for node in graphs.results(self.module)]
        results = [cast(now, before.dtype) for now, before in zip(values, originals, strict=True)]
        return tuple(self._without_hidden(results))

    def _without_hidden(self, results: list[Any]) -> list[Any]:
        """The results, NaN if a NaN, or an overflow, would not show in them."""
        if not self.hidden:
            return results
        hidden = torch.stack(self.hidden).any()
        return [torch.where(hidden, torch.nan, result) if is_float(result) else result for result in results]

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        result = super().run_node(n)
        if self.dtype is torch.float16 and hides_nan(n):
            read = [self.env[operand] for operand in n.all_input_nodes]
            self.hidden += [torch.isnan(value).any() for value in read if is_float(value) and value.numel() > 0]
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem:
            return super().call_function(target, args, kwargs)
        to = self._dtype_for(target, args, kwargs)
        args, kwargs, back = self._operands(target, args, kwargs, to)
        try:
            result = super().call_function(target, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnsupportedVelocityError(
                f"the operation {target} of the velocity does not run in {self.dtype}: {error}",
                required="operations that exist in the velocity dtype",
                fix="use dtype=torch.float32 for this loop, or write the operation by others",
                where=graphs.user_line(self.current) if self.current is not None else "",
            ) from error
        result = result if back is None else cast(result, back)
        self.low += any(is_float(leaf) and leaf.dtype == self.dtype for leaf in tree_leaves(result))
        return self._without_overflow(target, args, kwargs, result)

    def _dtype_for(self, target: Any, args: Any, kwargs: Any) -> torch.dtype | None:
        """The dtype in which an operation is evaluated; None for that of its operands."""
        leaves = tree_leaves((args, kwargs))
        name = operator_table.name_of(target)
        if (real := self._real_dtype(leaves)) is not None:
            return self._widened(name, leaves, real, COMPLEX)
        if self.dtype in HALF and not operator_table.has_low_kernel(target, args):
            return self._widened(name, leaves, torch.float32, NO_KERNEL)
        if properties(target).dtype == "low":
            return self.dtype
        if self.dtype in HALF and not operator_table.follows_operands(target, args, kwargs):
            reason = "autocast's policy: fp32" if properties(target).dtype == "wide" else UNKNOWN
            return self._widened(name, leaves, torch.float32, reason)
        if self.dtype is torch.float16 and self.current is not None and _multiplies_entries(self.current):
            return self._widened(name, leaves, torch.float32, "a product of entries, whose range is fp32's")
        if self.current in self.feeds_wide:
            return self._widened(name, leaves, torch.float32, "read by operations in fp32")
        if is_beyond(self.dtype, operator_table.numbers(target, args, kwargs)):
            return self._widened(name, leaves, torch.float32, f"a constant beyond the range of {self.dtype}")
        promotes = operator_table.is_elementwise(target)  # so that a 0-d value takes the others' dtype
        return _widest([leaf for leaf in leaves if is_float(leaf) and (leaf.ndim > 0 or not promotes)])

    def _real_dtype(self, leaves: list[Any]) -> torch.dtype | None:
        """The dtype of the parts of an operation's complex operands and results; None where there are none."""
        results = tree_leaves(graphs.value(self.current)) if self.current is not None else []
        dtypes = {leaf.dtype for leaf in [*leaves, *results] if isinstance(leaf, torch.Tensor) and leaf.is_complex()}
        return _widest_of({dtype.to_real() for dtype in dtypes}) if dtypes else None

    def _widened(self, name: str, leaves: list[Any], dtype: torch.dtype, reason: str) -> torch.dtype:
        if self.dtype in HALF and any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            self.wide[name, reason] += 1
        return dtype

    def _operands(self, target: Any, args: Any, kwargs: Any, to: torch.dtype | None) -> tuple[Any, Any, Any]:
        """The operands in their dtypes, and the dtype to which the result is cast, or None."""
        back, row = None, properties(target)
        if to is None and _rounds_first(args, [leaf for leaf in tree_leaves((args, kwargs)) if is_float(leaf)]):
            if row.commutes and not kwargs:
                args = (args[1], args[0])
            else:
                to, back = torch.float32, self.dtype
        if to is None:
            return args, kwargs, back
        keep_scalars = to in HALF and row.dtype != "low" and operator_table.is_elementwise(target)

        def enter(value: Any) -> Any:
            return value if not is_float(value) or (keep_scalars and value.ndim == 0) else self._cast(value, to)

        def given(name: str, value: Any) -> Any:
            if name == TOLD:
                return to
            if name == STATISTICS:
                return value
            return tree_map(enter, named_arguments.within(to, value) if name in MASKS else value)

        names = [*named_arguments.names_of(target), *[""] * len(args)]
        args = tuple(map(given, names, args))
        return args, {name: given(name, value) for name, value in kwargs.items()}, back

    def _without_overflow(self, target: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The result, NaN where it overflowed though the operands are finite."""
        node = self.current
        if self.dtype is not torch.float16 or node is None:
            return result
        if properties(target).limit == "finite":
            self.finite.add(node)
        if not can_overflow(target, args, kwargs) or (read_by_products_alone(node) and not self.handles_nan):
            return result
        operands = [operand for operand in entrywise_operands(node) if operand not in self.finite]
        if not operands:
            self.finite.add(node)
        values = [value for value in map(self.env.__getitem__, operands) if is_float(value)]
        return tree_map(lambda x: self._noted(x, ops.mark_overflow(x, values)) if is_float16(x) else x, result)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        result = cast(value, dtype)
        return self._noted(value, result) if is_float16(result) and result is not value else result

    def _noted(self, value: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        """The marked value. If the velocity handles NaN itself, each overflow is noted: the user's code would otherwise
        handle our NaN as its own."""
        if self.handles_nan and value.numel() > 0:
            self.hidden.append((marked.isnan() & ~value.isnan()).any())
        return marked


def find_read_wide(velocity: fx.GraphModule, dtype: torch.dtype) -> set[fx.Node]:
    """The nodes that operations in float32 alone read, or that are results, of a velocity in the dtype.

    In float16 such operations are also elementwise ones whose results they alone read: what a sum adds up, and what is
    added to a softmax's argument, a mask of -1e9, has float32's range at no cost. So has a mask up to the attention
    that reads it, what a comparison or an argmax reads, in whose result a NaN would not show, and so have products of
    entries.
    """
    found: set[fx.Node] = set()
    wide: set[fx.Node] = set()
    for node in reversed(velocity.graph.nodes):
        passes = {user for user in node.users if operator_table.is_view(user.target)}
        others = [user for user in node.users if user.op != "output" and user not in passes]
        readers = [user for user in others if not named_arguments.is_mask(node, user)]
        if all(user in wide for user in readers) and passes <= found:
            found.add(node)
        if node.op == "call_function" and _is_wide(node, dtype, node in found):
            wide.add(node)
    return found


def _is_wide(node: fx.Node, dtype: torch.dtype, read_wide: bool) -> bool:
    """Whether an operation of a velocity in the dtype is evaluated in float32."""
    if properties(node.target).dtype == "low":
        return False
    if dtype is torch.float16 and (discretises(node) or _multiplies_entries(node)):
        return True
    follows = operator_table.follows_operands(node.target, node.args, node.kwargs)
    return not follows or ((read_wide or any(map(discretises, node.users))) and _follows_readers(node, dtype))


def _multiplies_entries(node: fx.Node) -> bool:
    """Whether a node multiplies or divides entries: what may leave float16's range from within it, either way."""
    return properties(node.target).product == "entries" and graphs.is_float(node)


def discretises(node: fx.Node) -> bool:
    """Whether a node makes integers or truth values of floating tensors: a NaN does not show in them."""
    if node.op != "call_function" or properties(node.target).nan in ("shows", "asks"):
        return False
    made = [leaf for leaf in tree_leaves(graphs.value(node)) if isinstance(leaf, torch.Tensor)]
    discrete = any(not graphs.has_derivatives(leaf.dtype) for leaf in made)
    return discrete and any(map(graphs.is_float, node.all_input_nodes))


def hides_nan(node: fx.Node) -> bool:
    """Whether the result of an operation may have no NaN though a floating operand has one.

    Of elementwise operations this is tried. Of others those are trusted whose dtype operator_table knows, but for the
    ones that it lists.
    """
    if node.op != "call_function" or not any(map(graphs.is_float, node.all_input_nodes)):
        return False
    nan = properties(node.target).nan
    if nan == "hides" or discretises(node):
        return True
    if nan or not graphs.is_float(node) or operator_table.is_known(node.target):
        return False
    if operator_table.is_elementwise(node.target):
        return _swallows_nan(node)
    return not operator_table.follows_operands(node.target, node.args, node.kwargs)


def _handles_nan(node: fx.Node) -> bool:
    """Whether an operation handles a NaN, or another infinity, that may be the user's."""
    return properties(node.target).nan in ("asks", "handles")


def _swallows_nan(node: fx.Node) -> bool:
    """Whether an elementwise operation on numbers and one NaN gives a number, for any place of the NaN."""
    with fake_tensors.real_tensors():
        return any(_gives_number(node, place) for place in filter(graphs.is_float, node.all_input_nodes))


def _gives_number(node: fx.Node, place: fx.Node) -> bool:
    def entry(operand: fx.Node) -> torch.Tensor:
        return torch.full((1,), torch.nan if operand is place else 0.5).to(graphs.value(operand).dtype)

    args, kwargs = fx.map_arg((node.args, node.kwargs), entry)
    return not bool(node.target(*args, **kwargs).isnan().all())


def _follows_readers(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether an operation is evaluated as its readers are, rather than as its operands."""
    elementwise = operator_table.is_elementwise(node.target) and graphs.is_float(node)
    return dtype is torch.float16 and elementwise and not _is_result(node)


def _is_result(node: fx.Node) -> bool:
    """Whether a node, or a view of it, is a result."""
    return any(user.op == "output" or (operator_table.is_view(user.target) and _is_result(user)) for user in node.users)


def _is_array(node: fx.Node) -> bool:
    return graphs.is_float(node) and graphs.value(node).ndim > 0


def can_overflow(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether finite operands of a half-precision operation may give an infinity that none of its numbers is."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    row = properties(target)
    within = operator_table.is_view(target) or row.dtype == "follows" or row.limit != ""
    if within and operator_table.is_elementwise(target):  # its number is rounded to the tensors' dtype, inside
        within = not any(map(_is_wide_number, tree_leaves((args, kwargs))))
    return not within and float("inf") not in map(abs, operator_table.numbers(target, args, kwargs))


def _is_wide_number(operand: Any) -> bool:
    value = graphs.value(operand) if isinstance(operand, fx.Node) else operand
    return is_float(value) and value.ndim == 0 and value.dtype not in HALF


def entrywise_operands(node: fx.Node) -> list[fx.Node]:
    """The operands whose infinity at an entry may be the result's; of a factor, or of an unknown operation, it comes
    out as NaN."""
    if properties(node.target).first_is_summand:
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    return node.all_input_nodes if operator_table.is_elementwise(node.target) else []


def mark_coefficients(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Mark what derivatives compute in float16 beside the marked values of the function, in place."""
    marking = ops.mark_overflow.default
    for node in nodes:
        marked = any(user.target is marking for user in node.users) or read_by_products_alone(node)
        if not is_float16(graphs.value(node)) or marked or not can_overflow(node.target, node.args, node.kwargs):
            continue
        with graph_module.graph.inserting_after(node):
            operands = [operand for operand in entrywise_operands(node) if graphs.is_float(operand)]
            new = graph_module.graph.call_function(marking, (node, operands))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)


def is_float16(value: Any) -> bool:
    """Whether a value is a float16 tensor."""
    return isinstance(value, torch.Tensor) and value.dtype is torch.float16


def read_by_products_alone(node: fx.Node) -> bool:
    """Whether only contractions read a value, as a factor: its infinity comes out as one, or as NaN.

    That of a key of an attention does not, nor one that a contraction adds.
    """

    def passes_on(user: fx.Node) -> bool:
        if operator_table.is_view(user.target):
            return read_by_products_alone(user)
        return operator_table.is_contraction(user) and node not in entrywise_operands(user)

    return bool(node.users) and all(map(passes_on, node.users))


def _rounds_first(args: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether a wide 0-d value, such as a time, is the first operand of an operation on low tensors: torch would round
    it to their dtype."""
    others = {tensor.dtype for tensor in tensors if tensor.ndim > 0}
    first = args[0] if args and is_float(args[0]) and args[0].ndim == 0 else None
    return first is not None and first.dtype not in HALF and len(others) == 1 and others <= set(HALF)


def is_beyond(dtype: torch.dtype, numbers: list[float]) -> bool:
    """Whether a number overflows in half precision, or is too small to keep its digits there."""
    info = torch.finfo(dtype)
    return dtype in HALF and any(
        info.max < abs(number) < float("inf") or 0 < abs(number) < info.smallest_normal for number in numbers
    )


def is_float(value: Any) -> bool:
    """Whether a value is a floating tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The tensor in another dtype, NaN where it overflows; what is no floating tensor, or has it, as it is."""
    if not is_float(value) or value.dtype == dtype:
        return value
    if torch.finfo(dtype).max * 2 < torch.finfo(value.dtype).max:
        return ops.narrow(value, dtype=dtype)
    return torch.ops.aten._to_copy.default(value, dtype=dtype)


def _widest(tensors: list[torch.Tensor]) -> torch.dtype | None:
    dtypes = {tensor.dtype for tensor in tensors}
    return None if len(dtypes) < 2 else _widest_of(dtypes)


def _widest_of(dtypes: set[torch.dtype]) -> torch.dtype:
    widest, *rest = dtypes
    for dtype in rest:
        widest = torch.promote_types(widest, dtype)
    return widest
