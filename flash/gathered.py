"""Decoding in torch operations, for the CPU and every machine without Triton: keys are gathered, then attended to.

The same contract as `kernels/decode.py` and `kernels/append.py`. Each sequence is a call of `flash.fallback` of its
own, on a view of its slot or on a copy of its pages. Lengths and tables are read on the host: on a GPU it waits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash import fallback
from flash.kernels.spec import Cache, Mods, Positions, Rotary, Spec, accumulator_dtype, dense_like
from flash.rotary import turned
from flash.tiling import cut


class Sequence(NamedTuple):
    """A sequence whose lengths are sound."""

    b: int
    slot: int
    pad: int  # keys at the front that nobody sees
    length: int  # keys before the append
    total: int  # and after it


def decode(
    q: Tensor,
    cache: Cache,
    new: int,
    rotary: Rotary | None,
    mods: Mods,
    spec: Spec,
    scale: float,
    positions: Positions,
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's last positions to its keys in the cache.

    Args:
        q: [batch, heads, seqlen_q, head_dim], any strides.
        cache: keys and values, those just appended among them; its seqlens do not count these.
        new: how many were just appended to each sequence.
        rotary: what turns the queries, or None.
        mods: optional operands: alibi_slopes and sinks.
        spec: choices of the call.
        scale: factor on q . k.
        positions: how far the window reaches.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v] in q's dtype and order in memory, and lse [batch, heads, seqlen_q],
        natural logarithm, float32 (float64 for float64); NaN for bad sequences.
    """
    left = positions.left if spec.left else None
    if q.shape[2] == 1:  # keys before the window are left out below, and after the last position there are none
        spec = spec._replace(causal=False, left=False, right=False)
    o = dense_like(q, cache.v.shape[3]).fill_(float("nan"))
    lse = torch.full(q.shape[:3], float("nan"), dtype=accumulator_dtype(q), device=q.device)
    for at in sequences(cache, new):
        start = at.total - q.shape[2]  # position of query 0
        first = at.pad  # the first key that some query sees
        if left is not None:
            first = max(first, min(start - left, at.total))
        places = places_of(cache, at.slot, first, at.total)
        if places is None:
            continue
        own = q[at.b : at.b + 1]
        if rotary is not None:
            own = turned(own, following(own, start - at.pad), rotary)
        keys, values = (gathered(x, places) for x in (cache.k, cache.v))
        # scaled, they may be nothing that q's dtype holds
        dtype = q.dtype if cache.k_scale is None and cache.v_scale is None else lse.dtype
        keys, values = scaled(keys, cache.k_scale, at.b, dtype), scaled(values, cache.v_scale, at.b, dtype)
        there = positions._replace(q_offset=start - first)
        slopes = cut(mods.alibi_slopes, at.b)
        own_mods = mods._replace(alibi_slopes=slopes)
        o_own, lse_own = fallback.forward(own.to(dtype), keys, values, own_mods, spec, scale, there)
        o[at.b : at.b + 1], lse[at.b : at.b + 1] = o_own, lse_own
    return o, lse


def append(k: Tensor, v: Tensor, cache: Cache, rotary: Rotary | None) -> None:
    """Write new keys, turned by their positions, and values into the cache, in place.

    Args:
        k: [batch, heads_k, new, head_dim], goes to positions seqlens ... seqlens + new - 1 of each sequence.
        v: [batch, heads_k, new, head_dim_v], likewise.
        cache: what is written to; nothing is for a sequence whose lengths are bad, nor to a page that is none.
        rotary: what turns the keys, or None.
    """
    for at in sequences(cache, k.shape[2]):
        own = k[at.b : at.b + 1]
        if rotary is not None:
            own = turned(own, following(own, at.length - at.pad), rotary)
        for x, store, factor in ((own, cache.k, cache.k_scale), (v[at.b : at.b + 1], cache.v, cache.v_scale)):
            rows = bits(stored(x, factor, at.b, store.dtype))[0]
            if cache.table is None:
                bits(store)[at.slot, :, at.length : at.total] = rows
                continue
            pages, offsets = pages_of(cache, at.slot, at.length, at.total)
            there = (pages >= 0) & (pages < store.shape[0])
            bits(store)[pages[there], :, offsets[there]] = rows[:, there].transpose(0, 1)


def sequences(cache: Cache, new: int) -> Iterator[Sequence]:
    """The sequences whose lengths, slot and leftpad are sound."""
    k, table = cache.k, cache.table
    slots, capacity = (k.shape[0], k.shape[2]) if table is None else (table.shape[0], table.shape[1] * k.shape[2])
    lengths = cache.seqlens.tolist()
    own = range(len(lengths)) if cache.slots is None else cache.slots.tolist()
    pads = [0] * len(lengths) if cache.leftpad is None else cache.leftpad.tolist()
    for b, (slot, pad, length) in enumerate(zip(own, pads, lengths, strict=False)):
        total = length + new
        if 0 <= slot < slots and 0 <= length and total <= capacity and 0 <= pad <= total:
            yield Sequence(b, slot, pad, length, total)


def pages_of(cache: Cache, slot: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The page that the table lists for each position from start on, and the row within it, int64."""
    p = torch.arange(start, stop, device=cache.table.device)
    size = cache.k.shape[2]
    return cache.table[slot].long()[p // size], p % size


def places_of(cache: Cache, slot: int, start: int, stop: int) -> tuple[Tensor, Tensor] | tuple[int, slice] | None:
    """What indexes the first and third axis of the caches for positions start ... stop; None where a page is none."""
    if cache.table is None:
        return slot, slice(start, stop)
    pages, rows = pages_of(cache, slot, start, stop)
    return (pages, rows) if bool(((pages >= 0) & (pages < cache.k.shape[0])).all()) else None


def gathered(x: Tensor, places: tuple[Tensor, Tensor] | tuple[int, slice]) -> Tensor:
    """Keys or values of one sequence, [1, heads_k, keys, d]: of a slot a view, of pages a copy."""
    first, third = places
    if isinstance(first, int):
        return x[first : first + 1, :, third]
    return bits(x)[first, :, third].view(x.dtype).transpose(0, 1).unsqueeze(0)


def scaled(x: Tensor, factor: Tensor | None, b: int, dtype: torch.dtype) -> Tensor:
    """x [1, heads_k, keys, d] in a wider dtype, times sequence b's factors."""
    x = x.to(dtype)
    return x if factor is None else x * of_sequence(factor, b, dtype)


def stored(x: Tensor, factor: Tensor | None, b: int, dtype: torch.dtype) -> Tensor:
    """x [1, heads_k, new, d] as a cache of a dtype holds it: divided by its factor, float8 no larger than it can be."""
    wide = accumulator_dtype(x)
    if factor is not None:
        x = x.to(wide) / of_sequence(factor, b, wide)
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.to(wide).clamp(-largest, largest)
    return x.to(dtype)


def of_sequence(factor: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """Sequence b's factors, [1, heads_k, 1, 1]."""
    return cut(factor, b).to(dtype)[:, :, None, None]  # type: ignore[no-any-return]


def bits(x: Tensor) -> Tensor:
    """x, float8 as bytes: torch indexes those on every device."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def following(x: Tensor, start: int) -> Tensor:
    """Positions start ... of the rows of x [1, heads, rows, d]: [1, rows]."""
    return torch.arange(start, start + x.shape[2], device=x.device)[None]
