"""The oracle of decoding: what `flash.decode` does, one sequence and one position after the other, in float64.

Tests compare with it; nothing that ships imports it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import attention


class Decoded(NamedTuple):
    """What `decode` returns."""

    o: Tensor  # [batch, heads, seqlen_q, head_dim_v], float64
    lse: Tensor  # [batch, heads, seqlen_q], float64
    k_cache: Tensor  # what the caches hold afterwards, of their own dtype
    v_cache: Tensor


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = True,
    window: Any = None,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> Decoded:
    """Attention of each sequence's last positions to the keys that a cache has of it, new ones appended first.

    A sequence is bad, its rows are NaN and nothing is appended for it, where its length (with what is new) is negative
    or longer than its slot, its slot is none, cache_leftpad is not within 0 and that length, or its table lists a page
    that is none at a position from the first that some query may see up to the last.

    Args:
        q: [batch, heads, seqlen_q, head_dim], at positions total - seqlen_q ... total - 1.
        k_cache: [slots, heads_k, max_seqlen, head_dim], or with block_table [pages, heads_k, page_size, head_dim].
        v_cache: likewise, of head_dim_v.
        cache_seqlens: [batch], keys before the append; total is that and seqlen_new.
        block_table: [slots, max_pages]; default None.
        k: [batch, heads_k, seqlen_new, head_dim], goes to positions cache_seqlens ...; default None.
        v: likewise, of head_dim_v.
        rotary_cos: [positions, pairs]: q and k turn by their position less cache_leftpad, at least 0; past the last
            they become NaN. Default None.
        rotary_sin: likewise.
        rotary_interleaved: whether pair n is dimensions 2n and 2n + 1, or n and n + pairs.
        cache_batch_idx: [batch], the slot of each sequence; default its own number.
        cache_leftpad: [batch], keys at the front that nobody sees; default 0.
        k_scale: [heads_k] or [batch, heads_k], what stored keys are multiplied by; default 1.
        v_scale: likewise.
        causal, window, alibi_slopes: as in `attention`, but causal by default.
        options: other keywords of `attention`.

    Returns:
        o, lse and the caches after the append; those given are left alone.
    """
    batch, heads, seqlen_q, _ = q.shape
    new = 0 if k is None else k.shape[2]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    o = q.new_full((batch, heads, seqlen_q, v_cache.shape[3]), float("nan"), dtype=torch.float64)
    lse = q.new_full((batch, heads, seqlen_q), float("nan"), dtype=torch.float64)
    slots = k_cache.shape[0] if block_table is None else block_table.shape[0]
    capacity = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    left = window if isinstance(window, int) or window is None else window[0]

    def place(slot: int, position: int) -> tuple[int, int] | None:
        """Element and row of the caches that hold a position; None where the table lists no page for it."""
        if block_table is None:
            return slot, position
        page = int(block_table[slot, position // k_cache.shape[2]])
        return (page, position % k_cache.shape[2]) if 0 <= page < k_cache.shape[0] else None

    sequences = []
    for b in range(batch):  # all are appended before any is read
        slot = b if cache_batch_idx is None else int(cache_batch_idx[b])
        pad = 0 if cache_leftpad is None else int(cache_leftpad[b])
        length, total = int(cache_seqlens[b]), int(cache_seqlens[b]) + new
        if not (0 <= slot < slots and 0 <= length and total <= capacity and 0 <= pad <= total):
            continue
        first = max(pad, 0 if left is None else min(max(total - seqlen_q - left, 0), total))
        turned = None if k is None else turn(k[b], length - pad, rotary_cos, rotary_sin, rotary_interleaved)
        for t in range(new):
            if (at := place(slot, length + t)) is not None:
                for cache, x, factor in ((k_cache, turned, k_scale), (v_cache, v[b], v_scale)):  # type: ignore[index]
                    cache[at[0], :, at[1]] = stored(x[:, t], scale_of(factor, b), cache.dtype)  # type: ignore[index]
        if all(place(slot, position) is not None for position in range(first, total)):
            sequences.append((b, slot, pad, first, total))
    for b, slot, pad, first, total in sequences:
        found = [place(slot, position) for position in range(first, total)]
        pages, rows = (torch.tensor([at[n] for at in found], dtype=torch.long) for n in (0, 1))  # type: ignore[index]
        keys = k_cache.double()[pages, :, rows].transpose(0, 1) * scale_of(k_scale, b)[:, None, None]
        values = v_cache.double()[pages, :, rows].transpose(0, 1) * scale_of(v_scale, b)[:, None, None]
        own = turn(q[b], total - seqlen_q - pad, rotary_cos, rotary_sin, rotary_interleaved)
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        o[b : b + 1], lse[b : b + 1] = attention(
            own[None], keys[None], values[None], causal=causal, window=window, q_offset=total - seqlen_q - first,
            alibi_slopes=slopes, return_lse=True, **options,
        )  # fmt: skip
    return Decoded(o, lse, k_cache, v_cache)


def turn(x: Tensor, start: int, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """x [heads, rows, head_dim] at positions start ..., its pairs turned and rounded to its dtype again."""
    if cos is None or sin is None:
        return x
    positions = torch.arange(start, start + x.shape[1]).clamp(min=0)
    known = (positions < cos.shape[0])[:, None]
    positions = positions.clamp(max=cos.shape[0] - 1)
    cos, sin = (y.double()[positions].where(known, float("nan")) for y in (cos, sin))
    pairs = cos.shape[1]
    one, other = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    y = x.double().clone()
    y[..., one] = x[..., one] * cos - x[..., other] * sin
    y[..., other] = x[..., one] * sin + x[..., other] * cos
    return y.to(x.dtype)


def scale_of(factor: Tensor | None, b: int) -> Tensor:
    """The factors [heads_k] or [1] of sequence b."""
    if factor is None:
        return torch.ones(1, dtype=torch.float64)
    return (factor[b] if factor.dim() == 2 else factor).double()


def stored(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x [heads_k, d] as a cache of a dtype holds it: divided by its factor, and float8 no larger than it can be."""
    y = x.double() / factor[:, None]
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        y = y.clamp(-largest, largest)
    return y.float().to(dtype) if dtype != torch.float64 else y
