"""How the kernels that read and write a cache are compiled without a GPU: what a launch would give them."""

from typing import Any

from flash.kernels.spec import Cache, View

from .leaf import NONE, TYPES, Leaf, pointer, view
from .space import Stored, Variant

KERNELS = ("append", "decode", "merge")
PARTS_AT_ONCE = 16


def function(kernel: str) -> Any:
    """The @triton.jit function of a kernel."""
    from flash.kernels import append, decode

    return {"append": append.append_kernel, "decode": decode.decode_kernel, "merge": decode.merge_kernel}[kernel]


def arguments(kernel: str, variant: Variant, stored: Stored) -> dict[str, Any]:
    """What parameters of the kernels are given, by name, besides those that all kernels know."""
    from flash.kernels.rotary import Angles, Turn

    acc = "fp64" if variant.dtype == "float64" else "fp32"
    dtype = "uint8" if kernel == "append" and stored.dtype == "float8_e4m3fn" else stored.dtype
    k, v = (view(TYPES[dtype], head_dim % 16 == 0) for head_dim in (variant.head_dim, variant.head_dim_v))
    one, stride, none = Leaf("constexpr", 1), Leaf("i32"), Leaf("i32", divisible=True)
    entries, factors = View(pointer("i32"), one, none, none, none), View(pointer("fp32"), none, one, none, none)
    held = Cache(
        k=k,
        v=v,
        seqlens=entries,
        table=View(pointer("i32"), stride, none, one, none) if stored.page else NONE,
        slots=entries if stored.slots else NONE,
        leftpad=entries if stored.slots else NONE,
        k_scale=factors if stored.scales else NONE,
        v_scale=factors if stored.scales else NONE,
    )
    angles: Any = NONE
    if stored.pairs:
        tables = pointer("fp32"), pointer("fp32")
        angles = Angles(*tables, stride, one, stride, one, stride)
    counts = ("slots", "pages", "capacity", "new", "splits")
    constants = {
        "turn": Turn(stored.pairs, stored.interleaved),
        "PAGE": stored.page,
        "SEVERAL": stored.several,
        "AT_ONCE": PARTS_AT_ONCE,
    }
    found = {
        **dict.fromkeys(("cache", "caches"), held),
        "angles": angles,
        **dict.fromkeys(counts, Leaf("i32")),
        **{name: Leaf("constexpr", value) for name, value in constants.items()},
        **dict.fromkeys(("parts", "lses"), pointer(acc)),
    }
    return found | {"o": view(acc, variant.head_dim_v % 16 == 0)} if kernel == "decode" and stored.split else found
