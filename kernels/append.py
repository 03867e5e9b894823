"""New keys and values join a cache: those of a sequence go to the positions after the ones that it has.

    k_cache[position length + t] = turn(k_t, length + t - leftpad) / k_scale        t = 0 ... new - 1
    v_cache[position length + t] = v_t / v_scale

rounded to the cache's dtype, float8 to no more than its largest. Nothing is written for a sequence that is bad (see
`cache`), nor where its table lists a page that is none. Sequences that share a slot's positions overwrite each other in
no order.

One program owns BLOCK_M of the rows of a sequence: of every head, each `new`. Compiled, not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl

from .cache import Place, extent_of, factor, listed, pointers, prepare, sequence
from .float8 import encoded
from .launch import Launched, coded, shape_of, view
from .rotary import angles_of, turned
from .spec import Cache, Config, Rotary
from .tile import origin

TILE = Config(16, 16, 4, 1)  # a row is a head's; few are appended at a time


@triton.jit
def put(x, value, cache_scale, b, h, place, inside, DIM: tl.constexpr):
    """Write value [R, BLOCK_D] at a place of x, a row for each of its head h [R], as x stores it."""
    if cache_scale is not None:
        WIDE: tl.constexpr = tl.float64 if value.dtype == tl.float64 else tl.float32
        divisor = factor(cache_scale, b, h, WIDE)[:, None]
        value = tl.div_rn(value.to(WIDE), divisor) if WIDE == tl.float32 else value / divisor
    if x.ptr.dtype.element_ty == tl.uint8:
        value = encoded(value.to(tl.float32))
    dims = tl.arange(0, value.shape[1])
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(pointers(x, h, place, dims), value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["new", "heads"])
def append_kernel(
    k, v, cache, angles, extent, new, heads, shape: tl.constexpr, turn: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(heads * new, BLOCK_M)
    b = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    h, t = tl.minimum(row // new, heads - 1), row % new
    extent = extent_of(extent)
    own = sequence(cache, extent, b, new)
    p = own.total - new + t
    given = row < heads * new
    good = given & (own.bad == 0)
    if PAGE == 0:
        place = Place(own.slot, tl.zeros_like(own.slot), p)
    else:
        page, lie = listed(cache, extent, own.slot, p // PAGE, good)
        place = Place(page, tl.zeros_like(own.slot), p % PAGE)
        good &= lie == 0

    rows = (origin(k, b, h) + t.to(tl.int64) * k.stride_s)[:, None]
    positions = (p - own.leftpad)[:, None]
    key = turned(rows, k.stride_d, positions, good[:, None], angles, turn, shape.head_dim, shape.block_d)
    put(cache.k, key, cache.k_scale, b, h, place, good, shape.head_dim)

    dims = tl.arange(0, shape.block_dv)
    rows = (origin(v, b, h) + t.to(tl.int64) * v.stride_s)[:, None]
    inside = good[:, None] & (dims < shape.head_dim_v)[None, :]
    value = tl.load(rows + (dims.to(tl.int64) * v.stride_d)[None, :], mask=inside, other=0.0)
    put(cache.v, value, cache.v_scale, b, h, place, good, shape.head_dim_v)


def append(k: torch.Tensor, v: torch.Tensor, cache: Cache, rotary: Rotary | None) -> Launched:
    """Launch the kernel, which writes to cache.k and cache.v.

    Args:
        k: [batch, heads_k, new, head_dim], any strides, of a dtype that holds all values of the cache's.
        v: [batch, heads_k, new, head_dim_v], likewise.
        cache: where they go.
        rotary: turns k by its positions; None leaves it.

    Returns:
        The launch.
    """
    batch, heads, new, _ = k.shape
    bits = {name: x.view(torch.uint8) for name in ("k", "v") if (x := getattr(cache, name)).dtype.itemsize == 1}
    views, extent, page = prepare(cache._replace(**bits))
    angles, turn = angles_of(rotary)
    programs = batch * triton.cdiv(heads * new, TILE.block_m)
    rest = (view(k), view(v), views, angles, coded(extent), new, heads, shape_of(k, k, v), turn, page)
    return Launched.by(append_kernel, programs, k.device, TILE, *rest)
