"""How Gluon kernels are compiled without a GPU: their descriptors, their options, and Triton's name for their source.

What is private in Triton stands here and nowhere else: the class of a Gluon source, and how a descriptor is written in
a signature (Triton 3.6 to 3.9).
"""

from typing import Any

from flash.kernels.spec import Config

from .leaf import NONE, Leaf, pointer
from .space import Variant

KERNELS = ("hopper_forward", "hopper_backward", "hopper_dkdv", "hopper_convert")  # dkdv: the backward without dq
SHORT = {"float16": "fp16", "bfloat16": "bf16"}


def function(kernel: str) -> Any:
    """The @gluon.jit function of a kernel.

    Raises:
        RuntimeError: this Triton has no Gluon.
    """
    try:
        from flash.kernels import hopper_backward, hopper_forward
    except ImportError as error:
        raise RuntimeError(f"{kernel} is written in Gluon, which this Triton lacks: {error}") from error
    functions = {"hopper_forward": hopper_forward.forward_kernel, "hopper_convert": hopper_backward.convert_kernel}
    return functions.get(kernel, hopper_backward.backward_kernel)


def source(function: Any) -> Any:
    """The class that holds the source of a jitted function."""
    from triton.compiler import ASTSource

    if not function.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def descriptor(dtype: str, rows: int, columns: int) -> str:
    """The type of a descriptor of tiles [1, 1, rows, columns]."""
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, dtype))
    return f"tensordesc<{SHORT[dtype]}{block},{layout!r}>"


def padded(variant: Variant) -> tuple[int, int]:
    """Columns of the tiles that hold head_dim and head_dim_v."""
    from flash.kernels.hopper_forward import tile_of

    found = tile_of(variant.head_dim), tile_of(variant.head_dim_v)
    if 0 in found:
        raise ValueError(f"no tile holds head_dim {variant.head_dim} and head_dim_v {variant.head_dim_v}")
    return found


def rows_descriptor(rows: int) -> str:
    """The type of a descriptor of tiles [rows] of one number a query."""
    from triton.experimental.gluon import language as gl

    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return f"tensordesc<fp32[{rows}],{layout!r}>"


def descriptors(kernel: str, variant: Variant, config: Config) -> dict[str, str]:
    """The types of a kernel's descriptors, by parameter."""
    columns, columns_v = padded(variant)
    if kernel != "hopper_forward":
        return {
            **dict.fromkeys(("q_desc", "k_desc", "dk_desc"), descriptor(variant.dtype, 64, columns)),
            **dict.fromkeys(("do_desc", "v_desc", "dv_desc"), descriptor(variant.dtype, 64, columns_v)),
            **dict.fromkeys(("lse_desc", "delta_desc"), rows_descriptor(config.block_m)),
        }
    return {
        "q_desc": descriptor(variant.dtype, 64, columns),
        "k_desc": descriptor(variant.dtype, config.block_n, columns),
        "v_desc": descriptor(variant.dtype, config.block_n, columns_v),
        "o_desc": descriptor(variant.dtype, 64, columns_v),
    }


def arguments(kernel: str, config: Config, wide: Any, wide_v: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """What parameters of the kernels are given besides descriptors and what all kernels know."""
    from flash.kernels import hopper_backward, hopper_forward

    number, single = Leaf("i64"), Leaf("fp32")
    slots = config.num_stages
    if kernel == "hopper_forward":
        given: Any = hopper_forward.Given(number, number, single, single)
        return {"sources": hopper_forward.Sources(wide, wide_v), "given": given, "SLOTS": Leaf("constexpr", slots)}
    given = hopper_backward.Given(NONE if kernel == "hopper_dkdv" else pointer("fp32"), single, single, single)
    static = hopper_backward.Static(constants["spec"], constants["shape"], slots)
    return {"given": given, "static": Leaf("constexpr", static)}


def candidates(kernel: str, head_dim: int, causal: bool) -> tuple[Config, ...]:
    """The configurations that a kernel is shipped with for a head dimension, for full or for causal calls."""
    module = _module(kernel)
    return () if head_dim > module.HEAD_DIMS[-1] else tuple(module.candidates(head_dim, causal))


def config(kernel: str, variant: Variant) -> Config:
    """The Config that a kernel ships for a call."""
    banded = variant.causal or "window" in variant.features
    return _module(kernel).candidates(max(variant.head_dim, variant.head_dim_v), banded)[0]  # type: ignore[no-any-return]


def options(kernel: str, config: Config) -> dict[str, int]:
    """The compiler's options in a launch of a kernel with a Config."""
    if kernel == "hopper_convert":  # a plain one
        return {}
    return _module(kernel).options_of(config)  # type: ignore[no-any-return]


def _module(kernel: str) -> Any:
    from flash.kernels import hopper_backward, hopper_forward

    return hopper_forward if kernel == "hopper_forward" else hopper_backward
