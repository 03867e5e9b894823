"""Attention of a few new queries to a cache of keys and values: what a generation loop calls for each token."""

import torch

from . import replays
from .cache_ops import attend
from .checks import Window, check_flag
from .kernels.spec import Cache, Config
from .ops import would_lose
from .step import Step, rotary_of


def flash_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    causal: bool = True,
    window: Window = None,
    scale: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    config: Config | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention of each sequence's last positions to its keys in a cache, new ones appended first.

        total = cache_seqlens + seqlen_new                  of each sequence
        s_ij  = softcap(scale * q_i . k_j) - slope * |total - seqlen_q + i - j|
        lse_i = log(exp(sink) + sum_j exp(s_ij))            over the keys j < total that query i sees
        o_i   = sum_j exp(s_ij - lse_i) v_j

    Query i is at position total - seqlen_q + i; k_j is what the cache has at position j, times k_scale, and v_j
    likewise. A key is seen where causal, window and cache_leftpad all allow it; what is hidden reaches nobody, NaN
    included. A query that sees no key has o = 0, lse = -inf (with sinks: the sink).

    Lengths, tables and slots are read on the device and never waited for, save by the torch backend. Whatever they
    hold, nothing is read or written out of bounds. A sequence is bad where its length is negative, or with what is new
    longer than its slot; where its slot is none; where its cache_leftpad is not within 0 and total; where its table
    lists a page that is none, at a position from the first that some query sees up to the last. Its rows are NaN in o
    and lse, those of the others are not touched, and nothing is appended to it; where only its table is wrong, what has
    a page is.

    The call repeats bit for bit. Two sequences must not share memory that one of them appends to, nor may k and v lie
    in the caches: what is read while it is written is anything.

    Args:
        q: [batch, heads, seqlen_q, head_dim], float16, bfloat16, float32 or float64; head_dim from 1 to 512; any
            strides. The kernels are made for 1 to 16 queries; longer ones, such as a chunk of a prompt, are served.
        k_cache: [slots, heads_k, max_seqlen, head_dim], any strides: a slot for each sequence; with block_table
            [pages, heads_k, page_size, head_dim], any page_size: flash-attn's [pages, page_size, heads_k, head_dim] is
            k_cache.transpose(1, 2). heads_k divides heads, as in flash_attention. Of q's dtype, or a narrower one that
            it holds: float8_e4m3fn for any, float16 or bfloat16 for float32, all for float64. Written to where k comes.
        v_cache: likewise, of head_dim_v; head_dim_v from 1 to 512.
        cache_seqlens: int32 [batch], keys that each sequence has; those in k are not counted.
        block_table: int32 [slots, max_pages]: position p of a sequence is at p % page_size of page
            block_table[slot, p // page_size]. Default: the cache is not paged.
        k: [batch, heads_k, seqlen_new, head_dim], of q's dtype: written to positions cache_seqlens up to
            cache_seqlens + seqlen_new - 1 before any is read. Default: nothing is appended.
        v: [batch, heads_k, seqlen_new, head_dim_v], likewise; given where k is.
        rotary_cos: [positions, pairs], any float dtype: the first 2 * pairs dimensions of q and k are turned by their
            position less cache_leftpad, one below 0 as 0; past the last they become NaN. Default: nothing is turned.
        rotary_sin: likewise; given where rotary_cos is.
        rotary_interleaved: pair n is dimensions 2n and 2n + 1 (GPT-J), not n and n + pairs (GPT-NeoX). Default: False.
        cache_batch_idx: int32 [batch], the slot of each sequence, a row of k_cache or block_table. Default: in order.
        cache_leftpad: int32 [batch], keys at the front of each sequence that no query sees. Default: 0.
        k_scale: float32 [heads_k] or [batch, heads_k], what stored keys are multiplied by when they are read; what is
            appended is divided by it, and no larger in float8 than that can be. Default: 1.
        v_scale: likewise for values. Default: 1.
        causal: key j is visible to query i when j <= total - seqlen_q + i. Default: True.
        window: an int W for (W, W), or (left, right), both >= 0: key j is visible to query i when
            -left <= j - (total - seqlen_q + i) <= right, and without limit where a side is None. Default: no window.
        scale: factor of q.k, any finite float. Default: head_dim ** -0.5.
        alibi_slopes: [heads] or [batch, heads], any float dtype. Default: none.
        softcap: a float c > 0: the score becomes c * tanh(score / c). Default: none.
        sinks: [heads], any float dtype: one more logit in the sum of the softmax, without a value. Default: none.
        num_splits: in how many parts at most, at least 1, each sequence's keys are shared out among programs, by its
            own length: the same number gives it the same bits, whatever is beside it. Default: by shapes and device.
        batch_invariant: the parts are of a fixed size, so that a sequence's bits are the same whatever is beside it, in
            the batch or in a wider table; their memory grows with max_seqlen or the table's width. Default: False.
        return_lse: also return lse. Default: False.
        backend: "auto", "triton" or "torch". One asked for by name never falls back. Default: "auto", which is Triton
            on a GPU that it serves, torch elsewhere.
        config: a flash.Config of the decode kernel, its block_m the most rows (queries times the heads that share a key
            head) of a tile. The torch backend ignores it, and num_splits. Default: by device, dtype and head_dim.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype and dense in q's axis order in memory; with return_lse (o,
        lse), lse [batch, heads, seqlen_q] in natural logarithm, float32 (float64 for float64).

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        NotImplementedError: a derivative is asked for, which flash_attention has; or the backend does not serve.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference", https://pytorch.org/blog/flash-decoding/.
    """
    check_flag("return_lse", return_lse)
    named = dict(
        q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens, block_table=block_table, k=k, v=v,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        k_scale=k_scale, v_scale=v_scale, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    tensors = tuple(named.values())
    options = (rotary_interleaved, causal, window, scale, softcap, num_splits, batch_invariant, backend, config)
    key = replays.key_of(tensors, options)
    if key is not None and (found := replays.again(key, tensors)) is not None:
        return found if return_lse else found[0]
    check_no_derivative(named)
    step = Step.of(
        q, Cache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, k_scale, v_scale),
        k=k, v=v, rotary=rotary_of(rotary_cos, rotary_sin, rotary_interleaved), causal=causal, window=window,
        scale=scale, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, num_splits=num_splits,
        batch_invariant=batch_invariant, backend=backend, config=config,
    )  # fmt: skip
    o, lse = attend(step) if key is None else replays.remembered(key, tensors, step)
    return (o, lse) if return_lse else o


def check_no_derivative(tensors: dict[str, torch.Tensor | None]) -> None:
    """Check, before a cache is written to, that no gradient or tangent is asked for."""
    compiling = torch.compiler.is_compiling()
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            continue
        if torch.is_grad_enabled() and x.requires_grad if compiling else would_lose(x):
            raise NotImplementedError(
                f"{name} asks for a derivative, which flash_attention_decode has not: call it under torch.no_grad(), "
                "or flash_attention, which has one"
            )
