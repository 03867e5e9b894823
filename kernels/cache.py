"""Where a cache holds position p of a sequence: in its slot, or in the page that the slot's table lists for it.

    dense    k[slot, h, p]
    paged    k[table[slot, p // PAGE], h, p % PAGE]

Lengths, slots and tables are data that no host has read, and may lie. A sequence that lies about its length, its slot
or its left padding has no keys: nothing is read of it. A page that is none is replaced by one that exists, since to
hold an address costs less than to mask a load by it (an unsigned minimum, as -1 is a large number), and how the two
differ is kept, so that whoever read it knows: 1 to 4 % of the decode kernel's instructions, as `python -m bench.clamps`
counts them. Masks say where a sequence ends, and nothing else.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .float8 import decoded
from .launch import view
from .spec import Cache, View
from .tile import FARTHEST, number


class Extent(NamedTuple):
    """How much a cache holds, known when a kernel runs; kernels are given it by `launch.coded`."""

    slots: Any
    pages: Any  # at least 1; unused without a table
    capacity: Any  # positions of a slot
    apart: Any  # from a slot's list in the table to the next, which other sequences make longer


class Sequence(NamedTuple):
    """What a sequence has in a cache; of a bad one nothing."""

    slot: Any
    total: Any  # keys, those appended by this call included
    leftpad: Any
    bad: Any  # whether its length, slot or left padding lie


class Place(NamedTuple):
    """Where a tile of keys lies: key n in row `start + rows[n]` of `page`, or of page n where there is one for each."""

    page: Any  # the slot, where there are no pages
    start: Any
    rows: Any  # [N]


def prepare(cache: Cache) -> tuple[Cache, Extent, int]:
    """What kernels are given of a `Cache`: its Views, its Extent, and positions in a page (0 without a table)."""
    if cache.table is not None and cache.k.shape[0] == 0:  # whatever the table lists is no page
        k, v = (x.new_zeros(1, *x.shape[1:]) for x in (cache.k, cache.v))
        cache = cache._replace(k=k, v=v, table=torch.full_like(cache.table, -1))
    if cache.table is not None and abs(cache.table.stride(0)) >= 2**31:  # an Extent has 32 bits
        cache = cache._replace(table=cache.table.contiguous())
    positions = cache.k.shape[2]
    slots, lists = (cache.k.shape[0], 1) if cache.table is None else cache.table.shape
    views = Cache(
        k=view(cache.k),
        v=view(cache.v),
        table=None if cache.table is None else View(cache.table, 0, 0, cache.table.stride(1), 0),
        **{name: entries(getattr(cache, name)) for name in ("seqlens", "slots", "leftpad")},
        **{name: factors(getattr(cache, name)) for name in ("k_scale", "v_scale")},
    )
    apart = 0 if cache.table is None or len(cache.table) < 2 else cache.table.stride(0)
    extent = Extent(slots, cache.k.shape[0], min(positions * lists, FARTHEST.value), apart)
    return views, extent, 0 if cache.table is None else positions


def entries(x: torch.Tensor | None) -> View | None:
    """An int32 [batch] tensor as one kernel argument."""
    return None if x is None else View(x, x.stride(0), 0, 0, 0)


def factors(x: torch.Tensor | None) -> View | None:
    """A [batch or 1, heads_k or 1] tensor as one kernel argument."""
    if x is None:
        return None
    stride_b, stride_h = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return View(x, stride_b, stride_h, 0, 0)


@triton.jit
def extent_of(x):
    """The Extent that `launch.coded` made x of."""
    return Extent(number(x.slots), number(x.pages), number(x.capacity), number(x.apart))


@triton.jit
def entry(x, b):
    """x[b]."""
    return tl.load(x.ptr + b.to(tl.int64) * x.stride_b)


@triton.jit
def factor(x, b, h, DTYPE: tl.constexpr):
    """x[b, h], what stored numbers are multiplied by."""
    return tl.load(x.ptr + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h).to(DTYPE)


@triton.jit
def sequence(cache, extent, b, new):
    """The Sequence b, with `new` keys behind those that cache.seqlens counts."""
    length = entry(cache.seqlens, b)
    good = (length >= 0) & (length <= extent.capacity - new)
    slot = b.to(tl.int32)
    if cache.slots is not None:
        slot = entry(cache.slots, b)
    good &= (slot >= 0) & (slot < extent.slots)
    leftpad = length * 0
    if cache.leftpad is not None:
        leftpad = entry(cache.leftpad, b)
        good &= (leftpad >= 0) & (leftpad <= tl.where(good, length + new, 0))
    return Sequence(tl.where(good, slot, 0), tl.where(good, length + new, 0), tl.where(good, leftpad, 0), good == 0)


@triton.jit
def listed(cache, extent, slot, index, inside):
    """The pages that a slot's table lists, held to those that exist; and a number that is 0 where that changed none."""
    ptrs = cache.table.ptr + slot.to(tl.int64) * extent.apart + index.to(tl.int64) * cache.table.stride_s
    raw = tl.load(ptrs) if inside is None else tl.load(ptrs, mask=inside, other=0)
    last = (extent.pages - 1).to(tl.uint32)
    page = tl.minimum(raw.to(tl.uint32, bitcast=True), last).to(tl.int32, bitcast=True)
    return page, page ^ raw


@triton.jit
def unlisted(cache, extent, slot, begin, end, PAGE: tl.constexpr, N: tl.constexpr):
    """A number [N] that is 0 where the pages of all positions from begin on and before end exist; N at a time."""
    lies = tl.zeros([N], tl.int32)
    last = tl.where(begin < end, tl.cdiv(end, PAGE), 0)
    for index in range(begin // PAGE, last, N):
        at = index + tl.arange(0, N)
        _, lie = listed(cache, extent, slot, at, at < last)
        lies |= lie
    return lies


@triton.jit
def within(col, begin, end, N: tl.constexpr):
    """Which of the positions col ... col + N - 1 are from begin on and before end: [N]."""
    p = col + tl.arange(0, N)
    return (p >= begin) & (p < end)


@triton.jit
def locate(
    cache, extent, slot, col, begin, end, PAGE: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Where positions col ... col + N - 1 of a slot lie, and a number [N] or [] that is 0 where their pages exist.

    ALIGNED: N divides col. RAGGED: nothing is looked up before begin and from end on; some position is within.
    """
    rows = tl.arange(0, N)
    if PAGE == 0:
        return Place(slot, col, rows), 0
    elif ALIGNED and PAGE % N == 0:  # all in one page
        page, lie = listed(cache, extent, slot, col // PAGE, None)
        return Place(page, col % PAGE, rows), lie
    else:
        p = col + rows
        page, lie = listed(cache, extent, slot, p // PAGE, within(col, begin, end, N) if RAGGED else None)
        return Place(page, col * 0, p % PAGE), lie


@triton.jit
def pointers(x, h, place, dims):
    """Addresses of x[page, h, start + rows, dims], rows [N], dims [D] -> [N, D]."""
    base = x.ptr + place.page.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h
    base += place.start.to(tl.int64) * x.stride_s
    return (base + place.rows.to(tl.int64) * x.stride_s)[:, None] + (dims.to(tl.int64) * x.stride_d)[None, :]


@triton.jit
def load(
    x, h, place, inside, TYPE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """The tile of x at a place, as TYPE: [N, BLOCK_D], zero past DIM and, where RAGGED, for keys not inside [N]."""
    dims = tl.arange(0, BLOCK_D)
    ptrs = pointers(x, h, place, dims)
    if RAGGED:
        found = tl.load(ptrs, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
    elif BLOCK_D != DIM:
        found = tl.load(ptrs, mask=(dims < DIM)[None, :], other=0.0)
    else:
        found = tl.load(ptrs)
    return decoded(found).to(TYPE) if found.dtype == tl.uint8 else found.to(TYPE)
