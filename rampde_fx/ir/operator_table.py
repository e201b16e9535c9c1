"""What is known of torch's operators: which dtype each takes in a velocity, and what each does to numbers.

One row for each family, the operators of which the same is known; each operator stands in one row. So all that is
known of an operator can be read at one place, and to add one is to add its name to the row that fits it. A row for
each operator would say the same thing sixty times; a set for each property would put one operator into ten places,
where it is soon missing from one.

No other file lists operators: passes ask properties(), or the predicates below. What no row knows is evaluated in
float32, but for elementwise operations and views, which torch itself marks as such.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Operator:
    """What is known of the operators of a row. The defaults say nothing.

    Attributes:
        dtype: In a velocity "low" or "wide" (float32) as torch.amp's CUDA lists have it (docs: "CUDA Ops that can
            autocast"); or it "follows" its operands, for it chooses or moves entries, and adds none up. Elementwise
            operations and views that are not wide follow as well.
        product: "matrices": a product of matrices and vectors. "tensors": one of other whole tensors, as a convolution.
            "entries": entry by entry, quotients included.
        linear: Jointly in "all" of its floating operands, in "each" alone while the others are constant, or in the one
            at this position. Views are linear too.
        update: How a step's update is spelled by it: it may "add" to a state; "scale", "copy", "cast" or "choose" from
            one, "choose" by its first operand; "join" several tensors; or "write" to a part of one.
        divides: It divides its first operand by the second, entry by entry.
        first_is_summand: The rest is added to the first operand.
        adds_if: The name of a flag: if that is given, it adds to entries; otherwise it overwrites them.
        rounded_once: A sum that every device forms in float32, and rounds once, to the dtype that its argument `dtype`
            names.
        limit: The result of finite operands is "bounded", by them or by a small number; or "finite" whatever they are.
        nan: What becomes of a NaN in an operand. "hides": the result may be a number. "shows": floating results have
            it, others cannot. "asks": it tests for NaN or infinity. "handles": it replaces them. "chooses": it ignores
            entries that it does not choose. By default the result has it.
        compares: It, or its derivative, compares numbers that it was given with each other.
        jumps: Its result is not continuous: where an operand lies between two pieces, rounding decides which is taken.
        reads_shape: It reads the shape of its operand alone.
        aligned: Its half-precision kernel takes heads of whole groups of 16 bytes alone.
        commutes: Its first two operands may be exchanged.
        takes_tensors: It takes a tensor wherever it takes a number, and computes the same of it.
        traced: What tracing makes of it: it is "dropped", becomes a "reshape", or is taken "apart", by torch's own
            decomposition (with a name of ATen's without an overload).
        from_host: It waits for what it reads of the host's memory.
        weight: Its first result is multiplied entry by entry by the argument at this position, a weight.
        without_summand: The operator of its product by itself.
        wide_overload: The overload that takes low factors and gives a wide result.
        unwritten: Its result is memory that nothing has written.
        wide_on_cpu: A product that cpu_products.py has a CPU take in float32 where that is faster (with a name of
            ATen's without an overload).
        slow_on_cpu: The low dtypes in which torch has no fast kernel for it on any CPU.
    """

    dtype: Literal["low", "wide", "follows", ""] = ""
    product: Literal["matrices", "tensors", "entries", ""] = ""
    linear: Literal["all", "each", ""] | int = ""
    update: Literal["add", "scale", "copy", "cast", "choose", "join", "write", ""] = ""
    divides: bool = False
    first_is_summand: bool = False
    adds_if: str = ""
    rounded_once: bool = False
    limit: Literal["bounded", "finite", ""] = ""
    nan: Literal["hides", "shows", "asks", "handles", "chooses", ""] = ""
    compares: bool = False
    jumps: bool = False
    reads_shape: bool = False
    aligned: bool = False
    commutes: bool = False
    takes_tensors: bool = False
    traced: Literal["dropped", "reshape", "apart", ""] = ""
    from_host: bool = False
    weight: int | None = None
    without_summand: str = ""
    wide_overload: str = ""
    unwritten: bool = False
    wide_on_cpu: bool = False
    slow_on_cpu: tuple[torch.dtype, ...] = ()


# A name stands for all overloads that have no row of their own. The package's own operators begin with rampde_fx::.
ROWS = {
    # Products.
    "mm bmm": Operator("low", product="matrices", linear="each", wide_overload="dtype", wide_on_cpu=True),
    "mm.dtype bmm.dtype mv dot vdot": Operator("low", product="matrices", linear="each"),
    "addmm": Operator(
        "low", product="matrices", linear="each", first_is_summand=True, without_summand="mm", wide_on_cpu=True
    ),
    "baddbmm": Operator(
        "low", product="matrices", linear="each", first_is_summand=True, without_summand="bmm", wide_on_cpu=True
    ),
    "addmv": Operator("low", product="matrices", linear="each", first_is_summand=True, without_summand="mv"),
    "addmm.dtype baddbmm.dtype addbmm addr": Operator("low", product="matrices", linear="each", first_is_summand=True),
    "convolution": Operator("low", product="tensors", linear="each", wide_on_cpu=True),
    "convolution_backward": Operator("low", product="tensors", wide_on_cpu=True, slow_on_cpu=(torch.float16,)),
    # Of an attention on a CPU a query that is NaN attends to nothing.
    "_scaled_dot_product_flash_attention _scaled_dot_product_fused_attention_overrideable": Operator(
        "low", product="tensors", limit="bounded", nan="hides"
    ),
    "_scaled_dot_product_flash_attention_for_cpu": Operator(
        "low", product="tensors", limit="bounded", nan="hides", wide_on_cpu=True
    ),
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention": Operator(
        "low", product="tensors", limit="bounded", nan="hides", aligned=True
    ),
    """_scaled_dot_product_flash_attention_backward
    _scaled_dot_product_fused_attention_overrideable_backward""": Operator("low", product="tensors"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": Operator(
        "low", product="tensors", wide_on_cpu=True, slow_on_cpu=(torch.float16, torch.bfloat16)
    ),
    "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward": Operator(
        "low", product="tensors", aligned=True
    ),
    "_prelu_kernel": Operator("low", limit="bounded"),
    # Arithmetic.
    "add": Operator(linear="all", update="add", commutes=True, takes_tensors=True),
    "sub": Operator(linear="all", update="add", takes_tensors=True),
    "mul": Operator(product="entries", linear="each", update="scale", commutes=True, takes_tensors=True),
    "div": Operator(product="entries", linear=0, update="scale", divides=True, takes_tensors=True),
    "div.Tensor_mode div.Scalar_mode": Operator(product="entries", divides=True, jumps=True),  # they round the quotient
    "floor_divide": Operator(jumps=True),
    "neg": Operator(linear="all", update="scale", limit="bounded"),
    "pow": Operator("wide", takes_tensors=True),
    "lt le gt ge eq ne": Operator(takes_tensors=True, compares=True),
    "addcmul addcdiv rsub": Operator(traced="apart"),
    # Functions of entries.
    """abs asinh clamp clamp_max clamp_min elu gelu hardsigmoid hardtanh leaky_relu maximum minimum mish relu silu
    softshrink sqrt tanh_backward sigmoid_backward threshold_backward""": Operator(limit="bounded"),
    "ceil copysign floor fmod frac hardshrink heaviside remainder round threshold trunc": Operator(
        limit="bounded", jumps=True
    ),
    "tanh sigmoid sin cos erf erfc atan": Operator(limit="finite"),
    "atan2 sign sgn": Operator(limit="finite", jumps=True),
    """elu_backward leaky_relu_backward log_sigmoid_forward log_sigmoid_backward hardswish hardswish_backward
    hardsigmoid_backward hardtanh_backward mish_backward glu glu_backward rrelu_with_noise_functional
    _prelu_kernel_backward native_dropout_backward polar""": Operator("follows"),
    """exp expm1 log log10 log2 log1p reciprocal rsqrt acos asin cosh sinh tan erfinv softplus softplus_backward
    logaddexp logaddexp2 logit lgamma digamma polygamma xlogy ldexp""": Operator("wide"),
    "_conj_physical": Operator(linear="all"),
    "isnan isinf": Operator(nan="asks"),
    "nan_to_num nansum nanmedian fmin fmax": Operator(nan="handles"),
    "masked_fill": Operator(limit="bounded", nan="chooses"),
    # Sums, norms, transforms.
    "sum mean": Operator("wide", linear="all", rounded_once=True),
    "cumsum _fft_r2c _fft_c2c _fft_c2r upsample_bilinear2d upsample_nearest2d upsample_bicubic2d": Operator(
        "wide", linear="all"
    ),
    """_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp prod cumprod var var_mean std
    std_mean norm linalg_vector_norm dist renorm native_layer_norm native_group_norm native_batch_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional cudnn_batch_norm
    _fused_rms_norm _fused_rms_norm_backward _cdist_backward _pdist_forward""": Operator("wide"),
    "native_layer_norm_backward": Operator("wide", weight=5),
    "native_group_norm_backward": Operator("wide", weight=4),
    "native_batch_norm_backward cudnn_batch_norm_backward": Operator("wide", weight=2),
    "_cdist_forward": Operator("wide", nan="hides"),
    "histc grid_sampler_2d grid_sampler_3d": Operator(nan="hides"),
    """col2im avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d
    upsample_nearest1d upsample_nearest3d""": Operator(linear="all"),
    "adaptive_max_pool2d fractional_max_pool2d": Operator(nan="shows"),
    "_linalg_solve_ex linalg_solve_triangular": Operator(linear=1),
    "triangular_solve cholesky_solve": Operator(linear=0),
    "linalg_lu_solve": Operator(linear=2),
    # What moves entries, or chooses among them.
    "clone": Operator("follows", linear="all", update="copy"),
    "expand": Operator(update="copy"),
    "rampde_fx::stop_gradient": Operator(linear="all", update="copy"),
    "_to_copy": Operator("follows", linear="all", update="cast", from_host=True),
    "convert_element_type": Operator("follows", linear="all", update="cast"),  # in what Inductor lowers
    "rampde_fx::narrow": Operator(update="cast"),
    "where": Operator(linear="all", update="choose", limit="bounded", nan="chooses", takes_tensors=True),
    "cat stack": Operator("follows", linear="all", update="join"),
    "slice_scatter select_scatter": Operator("follows", linear="all", update="write"),
    "index_put": Operator("follows", linear="all", update="write", adds_if="accumulate", from_host=True),
    "_unsafe_index_put": Operator("follows", linear="all", adds_if="accumulate"),
    "scatter": Operator("follows", linear="all", adds_if="reduce"),
    "index_add scatter_add": Operator(linear="all", first_is_summand=True),
    "index copy": Operator("follows", linear="all", from_host=True),
    "copy_ device_put": Operator(from_host=True),
    """as_strided_scatter complex constant_pad_nd diagonal_scatter embedding expand_copy flip gather im2col index_select
    reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d replication_pad2d replication_pad3d roll
    rot90 take tril triu""": Operator("follows", linear="all"),
    "amax amin aminmax argmax argmin kthvalue max median min mode sort topk": Operator("follows", compares=True),
    """_unsafe_index arange channel_shuffle fill full index_fill masked_scatter masked_select pixel_shuffle
    pixel_unshuffle scalar_tensor select_backward slice_backward""": Operator("follows"),
    "max_pool2d_with_indices max_pool3d_with_indices native_dropout": Operator("follows", nan="shows"),
    "zeros_like ones_like full_like new_zeros new_ones new_full sym_size sym_stride sym_numel": Operator(
        "follows", reads_shape=True
    ),
    "empty empty_permuted empty_strided": Operator("follows", unwritten=True),
    "empty_like new_empty new_empty_strided": Operator("follows", reads_shape=True, unwritten=True),
    "alias lift_fresh_copy": Operator("follows", traced="dropped"),
    "detach lift_fresh": Operator(traced="dropped"),
    "view.default _unsafe_view": Operator(traced="reshape"),
}
TABLE = {name: row for names, row in ROWS.items() for name in names.split()}
# Other names of these, by which Dynamo's graph may call them: those of Python's operators in place, torch's aliases.
OTHER_NAMES = {
    "iadd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "multiply": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "itruediv": "div",
    "ipow": "pow",
}
UNKNOWN = Operator()


def name_of(target: Any) -> str:
    """The name of an ATen operator up to its overload."""
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)


def properties(target: Any) -> Operator:
    """What is known of an operator: that of its overload, or of its name. Of a user's own nothing is."""
    if not isinstance(target, torch._ops.OpOverload):
        return UNKNOWN
    name = name_of(target)
    if target.namespace not in ("aten", "prims"):
        return TABLE.get(f"{target.namespace}::{name}", UNKNOWN)
    return TABLE.get(f"{name}.{target._overloadname}", TABLE.get(name, UNKNOWN))


def properties_of_captured(name: str) -> Operator:
    """What is known of a function or a method of torch, or an operator of Python, by its name in Dynamo's graph."""
    plain = name.removesuffix("_")  # in place
    return TABLE.get(OTHER_NAMES.get(plain, plain), UNKNOWN)


def packets(has: Callable[[Operator], Any]) -> list[Any]:
    """The ATen operators, with all of their overloads, whose rows have a property.

    No name in these rows has an overload, or is one of the package's own.
    """
    return [getattr(aten, name) for name, row in TABLE.items() if has(row)]


def is_view(target: Any) -> bool:
    """Whether an operator returns another view of its first operand."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def is_cast(target: Any) -> bool:
    """Whether an operator returns its operand in another dtype."""
    return properties(target).update == "cast"


def is_elementwise(target: Any) -> bool:
    """Whether each entry of the result follows from one entry of each operand, after broadcasting."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def follows_operands(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation may take its operands' dtype however low: it multiplies no tensors and adds few terms."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    dtype = properties(target).dtype
    if target.namespace not in ("aten", "prims", "rampde_fx") or dtype == "wide" or _adds(target, args, kwargs):
        return False
    return target.namespace == "rampde_fx" or is_elementwise(target) or is_view(target) or dtype == "follows"


def has_low_kernel(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether an attention's kernel takes heads of this size in half precision; True for all that is no attention."""
    if not properties(target).aligned:
        return True
    heads = [argument(target, name, args, {}).shape[-1] for name in ("query", "key", "value")]
    return all(size % 8 == 0 for size in heads)


def _adds(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = properties(target).adds_if
    return bool(name and argument(target, name, args, kwargs))


def argument(target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator's argument is given; None if nothing, or if this overload does not have it."""
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get(name)


def linear_operands(node: fx.Node, varying: Set[fx.Node]) -> list[fx.Node]:
    """The varying operands in which an operation is linear; none where it is not linear in what varies."""
    row = properties(node.target)
    operands = [operand for operand in node.all_input_nodes if operand in varying]
    if is_view(node.target) or row.linear == "all" or node.target is operator.getitem:
        return operands
    if row.first_is_summand and node.args[0] in operands:
        return [node.args[0], *operands[1:]] if len(operands) <= 2 else [node.args[0]]
    only = len(operands) == 1 and _reads_once(node, operands[0])
    linear = row.linear == "each" or (isinstance(row.linear, int) and only and node.args[row.linear] is operands[0])
    return operands if only and linear else []


def _reads_once(node: fx.Node, operand: fx.Node) -> bool:
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    return read.count(operand) == 1


def is_known(target: Any) -> bool:
    """Whether an operation is a product, a sum or a function of which the table says what it does to numbers."""
    row = properties(target)
    return row.dtype in ("low", "wide") or row.linear != ""


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of whole tensors, the cost of a velocity."""
    return properties(node.target).product in ("matrices", "tensors")


def is_contraction(node: fx.Node) -> bool:
    """Whether a node is a product of whole tensors that is linear in each of them."""
    return is_product(node) and properties(node.target).linear == "each"


def is_matrix_product(node: fx.Node) -> bool:
    """Whether a node is a product of matrices or vectors to which nothing is added."""
    row = properties(node.target)
    return row.product == "matrices" and not row.first_is_summand


def numbers(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """The numbers with which an operation computes: not sizes, dimensions and the like."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return []
    given = {**{a.name: v for a, v in zip(schema.arguments, args, strict=False)}, **kwargs}
    computes = {a.name for a in schema.arguments if _computes(str(a.type))}
    found = (given[name] for name in computes if name in given)
    return [number for number in found if isinstance(number, (int, float)) and not isinstance(number, bool)]


def _computes(kind: str) -> bool:
    return kind.removeprefix("Optional[").removesuffix("]") in ("number", "float", "Tensor")
