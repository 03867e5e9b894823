"""Decoding in torch operations, for the CPU and every machine without Triton: keys are gathered, then attended to.

The same contract as `kernels/decode.py` and `kernels/append.py`. Each sequence is a call of `flash.fallback` of its
own, on a view of its keys, or on a copy (`flash/copied.py`) of as many heads of them at a time as make a small one.
Lengths and tables are read on the host: on a GPU it waits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash import fallback
from flash.copied import Buffer, Places, bits, copy
from flash.kernels.spec import Cache, Mods, Positions, Rotary, Spec, accumulator_dtype, dense_like
from flash.rotary import turned
from flash.tiling import Call, cut

COPIED = 2**22  # bytes of keys, and of values, that are copied at a time, unless a head for each thread has more


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
    group = q.shape[1] // max(1, cache.k.shape[1])
    buffers = Buffer(lse), Buffer(lse)
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
        there, own = positions._replace(q_offset=start - first), own.to(lse.dtype)
        for heads_k, keys, values in parts_of(cache, at.b, places, buffers):
            heads = slice(heads_k.start * group, heads_k.stop * group)
            call = Call(own[:, heads], keys, values, mods_of(mods, at.b, heads), spec, scale, there)
            o_part, lse_part = o[at.b : at.b + 1, heads], lse[at.b : at.b + 1, heads]
            fallback.forward_dense(call, o_part.zero_(), lse_part.fill_(float("-inf")))
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


def places_of(cache: Cache, slot: int, start: int, stop: int) -> Places | None:
    """Where positions start ... stop lie; None where a page is none."""
    if cache.table is None:
        return Places([slot], slice(start, stop))
    size = cache.k.shape[2]
    first, end = start // size, -(-stop // size)
    index = cache.table[slot, first : end if stop > start else first].long()
    pages = index.tolist()
    if any(not 0 <= page < cache.k.shape[0] for page in pages):
        return None
    return Places(pages, slice(start - first * size, stop - first * size), index)


def parts_of(
    cache: Cache, b: int, places: Places, buffers: tuple[Buffer, Buffer]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some key heads of sequence b at a time, with their keys and values [1, heads_k, keys, d].

    All heads at once, and views, where one place has the numbers as they are; else what fits into a buffer.
    """
    heads_k, dtype = cache.k.shape[1], buffers[0].held.dtype
    scales = cache.k_scale, cache.v_scale
    copied = len(places.pages) != 1 or cache.k.dtype != dtype or any(x is not None for x in scales)
    step = max(1, heads_k)
    if copied:
        size = (places.rows.stop - places.rows.start) * max(cache.k.shape[3], cache.v.shape[3]) * dtype.itemsize
        step = max(COPIED // max(1, size), torch.get_num_threads())  # a head's products are done by one thread
    for start in range(0, heads_k, step):
        some = slice(start, min(start + step, heads_k))
        if not copied:
            keys, values = (x[places.pages[0], some, places.rows].unsqueeze(0) for x in (cache.k, cache.v))
        else:
            factors = (None if x is None else cut(x, b)[0] for x in scales)
            keys, values = (
                copy(x, some, places, factor, buffer)
                for x, factor, buffer in zip(cache[:2], factors, buffers, strict=True)
            )
        yield some, keys, values


def stored(x: Tensor, factor: Tensor | None, b: int, dtype: torch.dtype) -> Tensor:
    """x [1, heads_k, new, d] as a cache of a dtype holds it: divided by its factor, float8 no larger than it can be."""
    wide = accumulator_dtype(x)
    if factor is not None:
        x = x.to(wide) / cut(factor, b).to(wide)[..., None, None]
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.to(wide).clamp(-largest, largest)
    return x.to(dtype)


def mods_of(mods: Mods, b: int, heads: slice) -> Mods:
    """Sequence b's operands, those of some heads."""
    slopes, sinks = cut(mods.alibi_slopes, b), mods.sinks
    return mods._replace(
        alibi_slopes=None if slopes is None else slopes[:, heads], sinks=None if sinks is None else sinks[heads]
    )


def following(x: Tensor, start: int) -> Tensor:
    """Positions start ... of the rows of x [1, heads, rows, d]: [1, rows]."""
    return torch.arange(start, start + x.shape[2], device=x.device)[None]
