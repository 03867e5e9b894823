"""flash_attn_with_kvcache of the flash-attn package, version 2, by flash_attention_decode.

    from flash.integrations.flash_attn import flash_attn_with_kvcache        # was: from flash_attn import

Parameters, their order, their defaults and their meaning are FlashAttention-2's. What it refuses is served: pages of
any size, cache_batch_idx and cache_leftpad beside block_table, head_dim of v that differs, float32 and float64, caches
of float8, any strides, machines without a GPU. Where lengths or tables are wrong, it has undefined behaviour, and this
one NaN. It has no derivative, as theirs; where one is asked for, this one says so.
"""

from collections.abc import Sequence
from numbers import Integral

import torch

from ..decode import flash_attention_decode
from ..kernels.spec import Rotary
from ..rotary import turned
from ..step import check_rotary
from .flash_attn_arguments import check_axes, closed, keywords_of


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn.flash_attn_with_kvcache: attention to the keys of a cache, new ones appended to it in place.

        total = cache_seqlens + seqlen_new                                                      of each sequence
        s_ij  = softcap(softmax_scale * q_i . k_j) - slope * |i + total - seqlen_q - j|         o = softmax(s) v

    Args:
        q: [batch, seqlen_q, heads, head_dim], float16, bfloat16, float32 or float64.
        k_cache: [slots, max_seqlen, heads_k, head_dim], or with block_table [pages, page_size, heads_k, head_dim]; any
            page_size. Of q's dtype, or a narrower one as in flash_attention_decode.
        v_cache: likewise, of head_dim_v.
        k: [batch, seqlen_new, heads_k, head_dim]: written to positions cache_seqlens up to cache_seqlens + seqlen_new -
            1 of the cache first. Default: nothing is appended.
        v: [batch, seqlen_new, heads_k, head_dim_v], likewise.
        rotary_cos: [positions, rotary_dim / 2], given with k: key t is turned by position cache_seqlens + t, and query
            i by cache_seqlens + i with causal or a window, by cache_seqlens without, less cache_leftpad each.
            Default: nothing is turned.
        rotary_sin: likewise.
        cache_seqlens: int32 [batch], keys that the cache has of each sequence, or one number for all. Default: as many
            as there is room for, where nothing is appended.
        cache_batch_idx: int32 [batch], the slot of each sequence. Default: its own number.
        cache_leftpad: int32 [batch], keys at the front that no query sees. Default: 0.
        block_table: int32 [batch, max_pages], the pages of each sequence. Default: the cache is not paged.
        softmax_scale: factor of q.k. Default: head_dim ** -0.5.
        causal: key j is visible to query i when j <= i + total - seqlen_q. Default: False.
        window_size: (left, right): and when -left <= j - (i + total - seqlen_q) <= right; a negative side has no limit.
            Default: (-1, -1), no window.
        softcap: a score s becomes softcap * tanh(s / softcap) where it is above 0. Default: 0.0, none.
        rotary_interleaved: pair n is dimensions 2n and 2n + 1, in place of n and n + rotary_dim / 2. Default: True.
        alibi_slopes: [heads] or [batch, heads], float32 (any float). Default: none.
        num_splits: in how many parts at most a sequence's keys are shared out; below 1: chosen by the shapes. Default:
            0.
        return_softmax_lse: also return softmax_lse. Default: False.

    Returns:
        out [batch, seqlen_q, heads, head_dim_v], of q's dtype; with return_softmax_lse (out, softmax_lse), [batch,
        heads, seqlen_q] in natural logarithm, float32 (float64 for float64), +inf where a query sees no key. Both are
        NaN for a sequence that is bad, as flash_attention_decode calls it.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: a derivative is asked for.

    Source: flash_attn/flash_attn_interface.py.
    """
    first, second = ("slots", "max_seqlen") if block_table is None else ("pages", "page_size")
    check_axes("q", q, "[batch, seqlen, heads, head_dim]")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_axes(name, x, f"[{first}, {second}, heads_k, head_dim]")
    for name, new in (("k", k), ("v", v)):
        if new is not None:
            check_axes(name, new, "[batch, seqlen_new, heads_k, head_dim]")
    if rotary_cos is not None and k is None:
        raise ValueError("k must be given with rotary_cos, which turns what is appended, got None")
    keywords = keywords_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    k, v = (None if x is None else x.transpose(1, 2) for x in (k, v))
    room = k_cache.shape[2] * (1 if block_table is None else block_table.shape[-1])
    lengths = lengths_of(cache_seqlens, q, k, room)
    rows = causal or keywords["window"] is not None  # each query has a position of its own
    if rotary_cos is not None and k is not None and not (k.shape[2] == q.shape[2] and (rows or q.shape[2] == 1)):
        # not where flash_attention_decode turns queries, which is the last positions of the keys
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved)
        check_rotary(q, rotary)
        start = lengths.long() if cache_leftpad is None else lengths.long() - cache_leftpad
        q_steps, k_steps = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
        q = turned(q, start[:, None] + (q_steps if rows else 0 * q_steps), rotary)
        k = turned(k, start[:, None] + k_steps, rotary)
        rotary_cos = rotary_sin = None
    o, lse = flash_attention_decode(
        q, k_cache, v_cache, cache_seqlens=lengths, block_table=block_table, k=k, v=v, rotary_cos=rotary_cos,
        rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, num_splits=num_splits if (num_splits or 0) > 0 else None, return_lse=True,
        **keywords,
    )  # fmt: skip
    o = o.transpose(1, 2)
    return (o, closed(lse)) if return_softmax_lse else o


def lengths_of(
    cache_seqlens: int | torch.Tensor | None, q: torch.Tensor, k: torch.Tensor | None, room: int
) -> torch.Tensor:
    """cache_seqlens as int32 [batch], of a slot with room for so many keys."""
    if isinstance(cache_seqlens, torch.Tensor):
        return cache_seqlens
    new = 0 if k is None else k.shape[2]
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must be given with k, which is written behind what it counts, got None")
        cache_seqlens = room
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (Integral, torch.SymInt)):
        raise ValueError(f"cache_seqlens must be an int or an int32 tensor [batch], got {cache_seqlens!r}")
    if not 0 <= cache_seqlens <= room - new:
        raise ValueError(f"cache_seqlens must be 0 to {room - new}, what the cache has room for, got {cache_seqlens}")
    return torch.full(q.shape[:1], cache_seqlens, dtype=torch.int32, device=q.device)
