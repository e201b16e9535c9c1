"""What is known of ATen operators, by name: which dtype each one takes in a velocity, and what each does to numbers.

A name stands for all of an operator's overloads. What no list knows is evaluated in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

ATTENTION = set(
    """_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable""".split()
)
# torch.amp's CUDA lists (docs: "CUDA Ops that can autocast"), as they appear in ATen graphs.
# Products, in low precision:
LOW = ATTENTION | set(
    """mm addmm bmm baddbmm addbmm mv addmv addr dot vdot convolution convolution_backward _prelu_kernel
    _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward""".split()
)
# Of these a half-precision kernel takes heads of whole groups of 16 bytes alone.
ALIGNED = set(
    """_scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
    _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward""".split()
)
# In float32:
WIDE = set(
    """exp expm1 log log10 log2 log1p pow reciprocal rsqrt acos asin cosh sinh tan erfinv softplus softplus_backward
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp sum prod cumsum cumprod mean var
    var_mean std std_mean norm linalg_vector_norm dist renorm native_layer_norm native_layer_norm_backward
    native_group_norm native_group_norm_backward native_batch_norm native_batch_norm_backward
    _native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional cudnn_batch_norm
    cudnn_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward _cdist_forward _cdist_backward _pdist_forward
    _fft_r2c _fft_c2c _fft_c2r upsample_bilinear2d upsample_nearest2d upsample_bicubic2d
    logaddexp logaddexp2 logit lgamma digamma polygamma xlogy square""".split()
)
# Beside elementwise operations and views these take the dtype of what they read: they choose or move entries, and add
# none up.
MOVES = set(
    """_to_copy alias amax amin aminmax argmax argmin as_strided_scatter cat clone complex constant_pad_nd copy
    diagonal_scatter embedding empty empty_like expand_copy fill flip full full_like gather getitem im2col index
    index_fill index_put index_select lift_fresh_copy masked_scatter masked_select max max_pool2d_with_indices
    max_pool3d_with_indices median min native_dropout native_dropout_backward new_empty new_full new_ones new_zeros
    ones_like polar reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d replication_pad2d
    replication_pad3d roll rot90 scatter select_backward select_scatter slice_backward slice_scatter sort stack take
    topk tril triu zeros_like _unsafe_index kthvalue mode scalar_tensor sym_size sym_stride sym_numel arange
    elu_backward leaky_relu_backward log_sigmoid_forward log_sigmoid_backward hardswish hardswish_backward
    hardsigmoid_backward mish_backward glu glu_backward rrelu_with_noise_functional _prelu_kernel_backward
    hardtanh_backward pixel_shuffle pixel_unshuffle channel_shuffle""".split()
)
# These overwrite entries in some forms, and add to them in others: the argument that says so, and its position.
ADDS_IF = {"index_put": ("accumulate", 3), "_unsafe_index_put": ("accumulate", 3)}
# Sums that every device forms in float32, and rounds once.
ROUNDED_ONCE = {"sum", "mean"}
# The result is no larger than the operands, or than a small number.
BOUNDED = ATTENTION | set(
    """abs atan atan2 asinh ceil clamp clamp_max clamp_min copysign cos elu erf erfc floor fmod frac gelu hardshrink
    hardsigmoid hardswish hardtanh heaviside isfinite leaky_relu log_sigmoid_forward masked_fill maximum minimum mish
    neg relu remainder round sgn sigmoid sign silu sin softshrink sqrt tanh threshold trunc where tanh_backward
    sigmoid_backward threshold_backward hardtanh_backward _prelu_kernel""".split()
)
# The result is never infinite, whatever the operands.
WITHIN_ONE = {"tanh", "sigmoid", "sin", "cos", "erf", "erfc", "atan", "atan2", "sign", "sgn"}
# The result may have no NaN though an operand has one: on a CPU a query that is NaN attends to nothing.
HIDES_NAN = ATTENTION | {"_cdist_forward", "histc", "grid_sampler_2d", "grid_sampler_3d"}
# These handle a NaN, or an infinity, that may be the user's.
HANDLES_NAN = {"isnan", "isinf", "isfinite", "nan_to_num", "nansum", "nanmedian", "fmin", "fmax"}
# An entry that is not chosen does not matter.
CHOOSES = {"where", "masked_fill"}
# Products of whole tensors with each other.
PRODUCTS = set(
    """mm addmm bmm baddbmm addbmm mv addmv addr dot vdot convolution convolution_backward linalg_solve
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention""".split()
)
# A summand and a product, and the product by itself.
FUSED_SUMS = {
    aten.addmm.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
    aten.addmv.default: aten.mv.default,
}
# Read the shape of their operand alone.
SHAPED_LIKE = set(
    """zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full sym_size sym_stride
    sym_numel""".split()
)
# Linear in all of the tensors whose entries are numbers; so are views.
LINEAR = set(
    """add sub neg sum mean cumsum clone copy _to_copy cat stack where index gather index_select take slice_scatter
    select_scatter diagonal_scatter as_strided_scatter index_put scatter scatter_add index_add constant_pad_nd flip
    roll rot90 repeat tril triu expand_copy _fft_r2c _fft_c2c _fft_c2r complex conj_physical _conj_physical
    stop_gradient im2col col2im avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_linear1d upsample_bilinear2d upsample_nearest1d upsample_nearest2d upsample_bicubic2d reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d embedding""".split()
)
# Linear in each of their tensors while the others are constant.
BILINEAR = set("mul mm bmm mv dot vdot convolution addmm baddbmm addmv addbmm addr linalg_vecdot".split())
# Linear in one operand, the one at this position.
LINEAR_IN = {
    "div": 0,
    "_linalg_solve_ex": 1,
    "linalg_solve_triangular": 1,
    "triangular_solve": 0,
    "cholesky_solve": 0,
    "linalg_lu_solve": 2,
}
SUMMAND_FIRST = {"addmm", "baddbmm", "addbmm", "addmv", "addr"}
COMMUTATIVE = {"mul", "add"}
ENTRYWISE_PRODUCTS = {"mul", "div"}
# Their first result is multiplied by the argument at this position.
WEIGHTS_A_GRADIENT = {
    "native_layer_norm_backward": 5,
    "native_group_norm_backward": 4,
    "native_batch_norm_backward": 2,
    "cudnn_batch_norm_backward": 2,
}
# Their results are not all numbers: a NaN shows in the others, or in the truth value itself.
SHOWS_NAN = {
    "isnan",
    "isinf",
    "isfinite",
    "native_dropout",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool2d",
    "fractional_max_pool2d",
}


def name_of(target: Any) -> str:
    """The name of an ATen operator up to its overload."""
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)


def is_view(target: Any) -> bool:
    """Whether an operator returns another view of its first operand."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def is_elementwise(target: Any) -> bool:
    """Whether each entry of the result follows from one entry of each operand, after broadcasting."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def follows_operands(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation may take its operands' dtype however low: it multiplies no tensors and adds few terms."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    name = name_of(target)
    if target.namespace not in ("aten", "prims", "rampde_fx") or name in WIDE or _adds(name, target, args, kwargs):
        return False
    return target.namespace == "rampde_fx" or is_elementwise(target) or is_view(target) or name in MOVES


def has_low_kernel(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether an attention's kernel takes heads of this size in half precision; so does any other operation."""
    if name_of(target) not in ALIGNED:
        return True
    names = [argument.name for argument in target._schema.arguments]
    heads = [args[names.index(name)].shape[-1] for name in ("query", "key", "value")]
    return all(size % 8 == 0 for size in heads)


def _adds(name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "scatter":
        return target not in (aten.scatter.src, aten.scatter.value)
    argument, position = ADDS_IF.get(name, ("", 0))
    return bool(argument and (args[position] if len(args) > position else kwargs.get(argument, False)))


def linear_operands(node: fx.Node, varying: Set[fx.Node]) -> list[fx.Node]:
    """The varying operands in which an operation is linear; none where it is not linear in what varies."""
    name = name_of(node.target)
    operands = [operand for operand in node.all_input_nodes if operand in varying]
    if is_view(node.target) or name in LINEAR or node.target is operator.getitem:
        return operands
    if name in SUMMAND_FIRST and node.args[0] in operands:
        return [node.args[0], *operands[1:]] if len(operands) <= 2 else [node.args[0]]
    if name in BILINEAR or name in LINEAR_IN:
        only = len(operands) == 1 and _reads_once(node, operands[0])
        return operands if only and (name in BILINEAR or node.args[LINEAR_IN[name]] is operands[0]) else []
    return []


def _reads_once(node: fx.Node, operand: fx.Node) -> bool:
    read: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), read.append)
    return read.count(operand) == 1


def is_known(name: str) -> bool:
    """Whether an operation is a product, a sum or a function of which a table says what it does to numbers."""
    return name in LOW | WIDE | LINEAR | BILINEAR | LINEAR_IN.keys()


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of whole tensors, the cost of a velocity."""
    return name_of(node.target) in PRODUCTS


def is_contraction(node: fx.Node) -> bool:
    """Whether a node is a product of whole tensors that is linear in each of them."""
    return is_product(node) and name_of(node.target) in BILINEAR


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
