"""How the kernels that read and write a cache are compiled without a GPU: what a launch would give them."""

from argparse import ArgumentParser, Namespace
from typing import Any

from flash.kernels.spec import Cache, Config, View

from .decoding import for_decode
from .form import ITEMSIZE
from .leaf import NONE, TYPES, Leaf, pointer, view
from .space import Stored, Variant

KERNELS = ("append", "decode", "merge")
SIZES = ITEMSIZE | {"float8_e4m3fn": 1}


def function(kernel: str) -> Any:
    """The @triton.jit function of a kernel."""
    from flash.kernels import append, decode

    return {"append": append.append_kernel, "decode": decode.decode_kernel, "merge": decode.merge_kernel}[kernel]


def as_bytes(target: str, kernel: str, variant: Variant, stored: Stored) -> bool:
    """Whether a kernel is given the bytes of a float8 cache, as it converts them itself."""
    backend, _, arch = target.partition(":")
    converted = variant.dtype != "float64" and (backend == "hip" or int(arch) >= 89)  # by Triton
    return stored.dtype == "float8_e4m3fn" and not (kernel == "decode" and converted)


def arguments(target: str, kernel: str, variant: Variant, stored: Stored) -> dict[str, Any]:
    """What parameters of the kernels are given, by name, besides those that all kernels know."""
    from flash.kernels.cache import Extent
    from flash.kernels.decode import Lengths, Walk
    from flash.kernels.rotary import Angles, Turn

    acc = "fp64" if variant.dtype == "float64" else "fp32"
    dtype = "uint8" if as_bytes(target, kernel, variant, stored) else stored.dtype
    k, v = (view(TYPES[dtype], head_dim % 16 == 0) for head_dim in (variant.head_dim, variant.head_dim_v))
    one, stride, none = Leaf("constexpr", 1), Leaf("i32"), Leaf("i32", divisible=True)
    entries, factors = View(pointer("i32"), one, none, none, none), View(pointer("fp32"), none, one, none, none)
    held = Cache(
        k=k,
        v=v,
        seqlens=entries,
        table=View(pointer("i32"), none, none, one, none) if stored.page else NONE,
        slots=entries if stored.slots else NONE,
        leftpad=entries if stored.slots else NONE,
        k_scale=factors if stored.scales else NONE,
        v_scale=factors if stored.scales else NONE,
    )
    angles: Any = NONE
    if stored.pairs:
        tables = pointer("fp32"), pointer("fp32")
        angles = Angles(*tables, stride, one, stride, one, stride)
    turn = Turn(stored.pairs, stored.interleaved)
    constants = {
        "turn": turn,
        "PAGE": stored.page,
        "walk": Walk(turn, stored.page, stored.alike, stored.several),
    }
    found = {
        **dict.fromkeys(("cache", "caches"), held),
        "angles": angles,
        **dict.fromkeys(("new", "heads", "seqlen_q", "splits"), Leaf("i32")),
        "extent": Extent(*[Leaf("i64")] * len(Extent._fields)),
        "lengths": Lengths(*[Leaf("i64")] * len(Lengths._fields)),
        **{name: Leaf("constexpr", value) for name, value in constants.items()},
        **dict.fromkeys(("parts", "lses"), pointer(acc)),
    }
    return found | {"o": view(acc, variant.head_dim_v % 16 == 0)} if kernel == "decode" and stored.split else found


def config(kernel: str, target: str, variant: Variant, stored: Stored) -> Config:
    """The Config that a kernel runs with for one query of each head."""
    from flash.kernels.append import TILE

    if kernel == "append":
        return TILE
    head_dim = max(variant.head_dim, variant.head_dim_v)
    return for_decode(target, variant.dtype, head_dim, variant.group, SIZES[stored.dtype], stored.page > 0).config


def options(kernel: str, backend: str, variant: Variant) -> dict[str, Any]:
    """What the compiler is told besides a Config."""
    from flash.kernels.decode import options_of

    if kernel != "decode" or variant.stored is None:
        return {}
    return options_of(backend == "cuda", not variant.stored.alike or bool({"alibi", "softcap"} & set(variant.features)))


def add_options(parser: ArgumentParser) -> None:
    """Options of a command line that say what a cache is like."""
    parser.add_argument("--cache-dtype", choices=tuple(SIZES), help="of a cache (append, decode); absent = q's")
    parser.add_argument("--page", type=int, default=0, help="positions in a page of the cache; 0 = no pages")
    parser.add_argument("--rotary", type=int, default=0, help="pairs that rotary embedding turns")


def stored_of(options: Namespace) -> Stored:
    """What the options say."""
    return Stored(options.cache_dtype or options.dtype, options.page, options.rotary, split=options.kernel == "merge")
