"""Which of PyTorch's operators only compute: what a graph or a program in a file may use without `trust`.

An operator is on the list if every one of its overloads takes and gives tensors, numbers, and lists of these; texts
only under the names of options that choose among formulas. Operators that begin with an underscore are internal, and
check less of what they are given: the ones that exports and scripts write are listed one by one. What trains, what
belongs to one device, and what changes the memory under a tensor is left out.
"""

from __future__ import annotations

import functools
import re

import torch

_TYPES = re.compile(
    r"(List|Optional|Dict|Tuple|\[|\]|,| |Tensor|int|float|bool|number|complex|str|t1|t2|tVal|t|Device|Generator|Any"
    r"|AnyEnumType|QScheme)+"
)
# Texts that choose among formulas, and texts that are computed with.
_OPTIONS = frozenset(
    {
        *("self", "norm", "reduce", "a", "b", "rounding_mode", "mode", "key", "interpolation", "driver", "substr"),
        *("UPLO", "approximate", "assert_msg", "separator", "ord", "side", "padding", "el", "s", "fillchar", "chars"),
        *("l", "string", "p", "input", "message", "idx", "t", "padding_side", "values", "old", "new", "pad_mode"),
        *("equation", "indexing", "type", "inputs", "dict", "to_add", "sorted", "default_value"),
    }
)
# The internal ones that exports, scripts and traces of ordinary networks hold.
_INTERNAL = frozenset(
    {
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_addmm_activation", "_assert_async", "_assert_scalar"),
        *("_assert_tensor_metadata", "_batch_norm_impl_index", "_cast_Float", "_cast_Int", "_cast_Long", "_conj"),
        *("_convolution", "_convolution_mode", "_dim_arange", "_embedding_bag", "_infer_size", "_list_to_tensor"),
        *("_log_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_reshape_alias"),
        *("_native_batch_norm_legit_no_training", "_native_multi_head_attention", "_no_grad_fill_", "_no_grad_zero_"),
        *("_pack_padded_sequence", "_pad_circular", "_pad_enum", "_pad_packed_sequence", "_prelu_kernel"),
        *("_reshape_from_tensor", "_safe_softmax", "_scaled_dot_product_attention_math", "_set_item", "_softmax"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_shape_as_tensor", "_size_if_not_equal", "_stack"),
        *("_tensor_to_list", "_thnn_fused_lstm_cell", "_to_copy", "_transformer_encoder_layer_fwd", "_unique2"),
        *("_unsafe_view", "_unsafe_index", "_unwrap_optional", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
        *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_weight_norm"),
        *("_weight_norm_interface", "__and__", "__or__", "__xor__", "__not__", "__is__", "__isnot__", "__contains__"),
        *("__getitem__", "__derive_index", "__range_length", "__lshift__", "__rshift__", "__interpolate"),
        *(
            "__round_to_zero_floordiv",
            "__upsample",
            "__upsample_bilinear",
            "__upsample_nearest",
            "_cat",
            "_grid_sampler",
        ),
        *("_nested_tensor_from_mask", "_nested_tensor_from_mask_left_aligned"),
        *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
    }
)
_NO_PART_OF_A_PASS = re.compile(
    r"backward|cudnn|miopen|mkldnn|mkl_|fbgemm|xla|vulkan|nested|sparse|seed$|record_stream|save|file|wait"
    r"|^(set_|set|set_data|data|slice_inverse|resize_|resize|resize_as_|resize_as|resize_output|requires_grad_|retain_grad|owner"
    r"|to_here|is_owner|local_value|confirmed_by_owner|get_gradients|grad|warn_deprecated|rename_?|align_to"
    r"|manual_seed|set_grad_enabled|storage.*|const_data_ptr|data_ptr)$"
)
_PRIM = frozenset(
    {
        *("NumToTensor", "RaiseException", "Print", "TupleIndex", "TupleUnpack", "ListUnpack", "Uninitialized", "abs"),
        *("dtype", "device", "layout", "is_cpu", "is_cuda", "is_meta", "is_mkldnn", "is_mps", "is_nested", "is_vulkan"),
        *("is_quantized", "is_sparse", "is_sparse_csr", "is_xla", "is_xpu", "itemsize", "max", "min", "name", "nbytes"),
        *("rangelist", "requires_grad", "tolist", "type", "unchecked_cast", "unchecked_unwrap_optional", "index"),
        *("EnumName", "EnumValue", "StringIndex", "ConstantChunk", "shape", "data", "isinstance", "ListConstruct"),
        *("is_maia", "is_mtia", "is_ipu"),
    }
)
_QUANTIZED = re.compile(r"(?!.*(_out|prepack\w*|unpack\w*|legacy|_params\w*|embedding\w*)$)[a-z]\w*")
_TORCHVISION = frozenset({"nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"})


def computes(space: str, name: str) -> bool:
    """True if the operator `space::name` only computes."""
    if space == "aten":
        return name in _computing()
    if space == "prim":
        return name in _PRIM
    if space == "prims":
        return name in _registered("prims") and _NO_PART_OF_A_PASS.search(name) is None and not name.startswith("_")
    if space == "quantized":
        return _QUANTIZED.fullmatch(name) is not None
    return space == "torchvision" and name in _TORCHVISION


def reads_or_writes_files(space: str, name: str) -> bool:
    """True if an operator takes the name of a file; for the message only."""
    return any(
        argument.name in ("filename", "path")
        for schema in torch._C._jit_get_schemas_for_operator(f"{space}::{name}")
        for argument in schema.arguments
    )


@functools.cache
def _computing() -> frozenset[str]:
    schemas: dict[str, list[str]] = {}
    refused: set[str] = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space != "aten":
            continue
        schemas.setdefault(name, []).append(schema.overload_name)
        if not _is_plain(schema):
            refused.add(name)
    return frozenset(name for name in schemas if name not in refused and _is_listed(name)) | _CONVERSIONS


# Some of their overloads take types or options of other kinds, and none does more than compute.
_CONVERSIONS = frozenset(
    {
        *("Int", "Float", "Bool", "Complex", "IntImplicit", "FloatImplicit", "ScalarImplicit", "__contains__"),
        *("is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype", "is_grad_enabled", "cuda", "is_cuda"),
        "set_grad_enabled",  # the interpreter leaves it out
    }
)


def _is_plain(schema: torch._C.FunctionSchema) -> bool:
    types = [str(argument.type) for argument in (*schema.arguments, *schema.returns)]
    texts = [argument.name for argument in schema.arguments if "str" in str(argument.type)]
    return all(_TYPES.fullmatch(text) for text in types) and all(name in _OPTIONS for name in texts)


def _is_listed(name: str) -> bool:
    if name.startswith("_"):
        return name in _INTERNAL or re.fullmatch(r"_upsample_\w+(?<!backward)", name) is not None
    return _NO_PART_OF_A_PASS.search(name) is None


@functools.cache
def names_that_do_more() -> frozenset[str]:
    """The names of the registered operators that a method of a value could mean and that don't only compute."""
    registered = _registered("aten") | _registered("prim")
    return frozenset(name for name in registered if not computes("aten", name) and not computes("prim", name))


@functools.cache
def _registered(space: str) -> frozenset[str]:
    names = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    return frozenset(name for found, _, name in names if found == space)
