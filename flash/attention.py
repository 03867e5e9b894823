"""Exact attention in memory that grows with the sequence: what the user calls.

`flash_attention` takes sequences of one length, or torch's jagged nested tensors; `flash_attention_varlen` takes
sequences of different lengths one after the other. Both are one Problem, and one call below.
"""

from typing import TYPE_CHECKING, Any

import torch

from . import plans
from .autograd import attend
from .dtensor import attend_distributed, is_distributed
from .problem import ConfigLike, Problem, Window, check_flag

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # slow to import, and whoever has one has done so

    from .mods import MaskMod, ScoreMod  # bring Triton


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    score_mod: "ScoreMod | None" = None,
    mask_mod: "MaskMod | None" = None,
    block_mask: "BlockMask | None" = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    config: ConfigLike = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention, forward and backward, without the [seqlen_q, seqlen_k] matrix.

        s_ij  = softcap(scale * q_i . k_j) + bias_ij - slope * |i + q_offset - j|, then score_mod
        lse_i = log(exp(sink) + sum_j exp(s_ij))       over the keys j that query i sees; without sinks, exp(sink) = 0
        o_i   = sum_j exp(s_ij - lse_i) v_j

    A key is seen where causal, window, mask, mask_mod, block_mask and a bias above -inf all allow it. What is hidden
    reaches nobody, NaN included. A query that sees no key has o = 0, lse = -inf (with sinks: the sink) and zero
    gradients. Empty batches and zero-length q or k are served. Every keyword works with every other.

    Args:
        q: [batch, heads, seqlen_q, head_dim], float16, bfloat16, float32 or float64; head_dim from 1 to 512; any
            strides. [batch, seqlen_q, head_dim] is one head, and comes back so. A nested tensor of torch.jagged layout
            has sequences of different lengths for seqlen_q: [batch, heads, *, head_dim], which is the transpose(1, 2)
            of what nested_tensor makes of [seqlen, heads, head_dim], or [batch, *, head_dim] for one head; then k and
            v are nested too, and what is said of flash_attention_varlen holds. A DTensor may be sharded by batch, heads
            or sequence (`flash.dtensor`); then k and v are DTensors too, and operands may be.
        k: [batch, heads_k, seqlen_k, head_dim], of q's dtype and device. heads_k divides heads: head h of q attends to
            head h // (heads // heads_k) of k and v (grouped-query and multi-query attention), which are never repeated
            in memory.
        v: [batch, heads_k, seqlen_k, head_dim_v], of q's dtype and device; head_dim_v from 1 to 512.
        causal: key j is visible to query i when j <= i + q_offset. Default: every key is visible.
        window: an int W for (W, W), or (left, right), both >= 0: key j is visible to query i when
            -left <= j - (i + q_offset) <= right, and without limit where a side is None; with causal, right is at most
            0. Default: no window.
        q_offset: position of the first query among the keys, for causal, window and alibi_slopes: an int, or an int32
            or int64 tensor of shape [] or [batch], read on the device. Default: seqlen_k - seqlen_q, the queries being
            the last ones.
        scale: factor of q.k, any finite float. Default: head_dim ** -0.5.
        mask: bool, True where query i sees key j, of any shape that broadcasts to [batch, heads, seqlen_q, seqlen_k]
            ([batch, seqlen_q, seqlen_k] for one head), read by its strides and never expanded: key padding is
            [batch, 1, 1, seqlen_k], a byte a key. Default: none.
        bias: added to the score, of any float dtype and of any shape that broadcasts likewise; its gradient has its own
            shape and dtype. -inf, or the lowest number of its dtype, hides the key. Default: none.
        alibi_slopes: [heads] or [batch, heads], any float dtype: slope * |i + q_offset - j| is subtracted from the
            score. Default: none.
        softcap: a float c > 0: the score becomes c * tanh(score / c), before bias. Default: none.
        sinks: [heads], any float dtype: one more logit in the sum of the softmax, without a value. Default: none.
        dropout_p: probability, in [0, 1), that an attention weight is dropped; others are multiplied by
            1 / (1 - dropout_p), and lse is not affected. Drawn from torch's generator: alike after the same
            torch.manual_seed, whatever the backend and the tiles. Default: 0.0.
        score_mod: a flash.mods.ScoreMod, called with raw positions i and j. Default: none.
        mask_mod: a flash.mods.MaskMod, called with raw positions i and j. Default: none.
        block_mask: a torch.nn.attention.flex_attention.BlockMask for (seqlen_q, seqlen_k), its blocks multiples of 16;
            those that it leaves out are never loaded. Default: none.
        deterministic: True keeps to kernels that repeat bit for bit: all but the Hopper backward, whose gradient of q
            is added up in any order. Default: follows torch.are_deterministic_algorithms_enabled().
        return_lse: also return lse. Default: False.
        backend: "auto", "triton", "hopper" or "torch". One asked for by name never falls back. Default: "auto", which
            is Triton on a GPU that it serves, the Hopper kernels where they were timed to be faster, torch elsewhere.
        config: tile sizes, a flash.Config for the forward or a dict of them for "forward", "dkdv" and "dq". The torch
            backend has no tiles and ignores it. Default: the tuned ones (see flash.info).

    Returns:
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype and dense in q's axis order in memory; with return_lse (o,
        lse), lse [batch, heads, seqlen_q] in natural logarithm, float32 (float64 for float64). Both are nested where q
        is, and differentiable with respect to q, k, v, bias, alibi_slopes and sinks.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        TypeError: score_mod, mask_mod or block_mask is of another type.
        NotImplementedError: what is asked for is not served, or not by the backend asked for.

    Source: Dao 2023, "FlashAttention-2", Algorithms 1 and 2, https://arxiv.org/abs/2307.08691.
    """
    check_flag("return_lse", return_lse)
    plain = (
        window is None and q_offset is None and mask is None and bias is None and alibi_slopes is None
        and sinks is None and type(dropout_p) is float and dropout_p == 0.0 and score_mod is None and mask_mod is None
        and block_mask is None and deterministic is None and config is None
    )  # fmt: skip
    if plain and (found := plans.attend(q, k, v, causal, scale, softcap, backend)) is not None:
        return found if return_lse else found[0]
    keywords: dict[str, Any] = dict(
        causal=causal, window=window, q_offset=q_offset, scale=scale, mask=mask, bias=bias, alibi_slopes=alibi_slopes,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, score_mod=score_mod, mask_mod=mask_mod,
        block_mask=block_mask, deterministic=deterministic, backend=backend, config=config,
    )  # fmt: skip
    if any(isinstance(x, torch.Tensor) and x.is_nested for x in (q, k, v)):
        o, lse = attend_nested(q, k, v, keywords)
    elif is_distributed(q, k, v):
        o, lse = attend_distributed(q, k, v, keywords)
    else:
        problem = Problem.of(q, k, v, **keywords)
        o, lse = attend(problem)
        if problem.one_head:
            o, lse = o.squeeze(1), lse.squeeze(1)
    return (o, lse) if return_lse else o


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window: Window = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    score_mod: "ScoreMod | None" = None,
    mask_mod: "MaskMod | None" = None,
    block_mask: "BlockMask | None" = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    config: ConfigLike = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention over sequences of different lengths that lie one after the other.

        o[rows_b] = attention(q[rows_b], k[keys_b], v[keys_b])      rows_b = cu_seqlens_q[b] : cu_seqlens_q[b + 1]
                                                                    keys_b = cu_seqlens_k[b] : cu_seqlens_k[b + 1]

    for each sequence b, as flash_attention defines it. Sequences of zero length are served. The lengths are read on the
    device, and never waited for. Rows that no sequence covers have o = 0, lse = -inf and zero gradients. A sequence
    whose ends decrease or lie outside of the tensors is bad, as is one longer than an axis of the mask or bias: nothing
    is read out of bounds, its rows are NaN in o, lse and the gradients, and those of the others are not touched.

    Args:
        q: [total_q, heads, head_dim], float16, bfloat16, float32 or float64; head_dim from 1 to 512; any strides.
            [total_q, head_dim] is one head, and comes back so.
        k: [total_k, heads_k, head_dim], of q's dtype and device; heads_k divides heads.
        v: [total_k, heads_k, head_dim_v], of q's dtype and device; head_dim_v from 1 to 512.
        cu_seqlens_q: int32 [batch + 1], on q's device: the queries of sequence b are cu_seqlens_q[b] up to
            cu_seqlens_q[b + 1].
        cu_seqlens_k: int32 [batch + 1], likewise for the keys.
        max_seqlen_q: length of the longest sequence of queries; the size that mask and bias broadcast to, and nothing
            else depends on it.
        max_seqlen_k: likewise for the keys.
        causal: as in flash_attention, with positions i and j counted from the start of the sequence. Default: False.
        window: likewise. Default: no window.
        q_offset: likewise; a tensor [batch] has one for each sequence. Default: for each sequence the length of its
            keys minus that of its queries.
        scale: factor of q.k, any finite float. Default: head_dim ** -0.5.
        mask: bool, of any shape that broadcasts to [batch, heads, max_seqlen_q, max_seqlen_k], indexed by the sequence
            and the positions within it. Default: none.
        bias: any float dtype, likewise. Default: none.
        alibi_slopes: [heads] or [batch, heads], any float dtype. Default: none.
        softcap: as in flash_attention. Default: none.
        sinks: [heads], any float dtype. Default: none.
        dropout_p: as in flash_attention. Default: 0.0.
        score_mod: a flash.mods.ScoreMod; b is the sequence, i and j are positions within it. Default: none.
        mask_mod: a flash.mods.MaskMod, likewise. Default: none.
        block_mask: a BlockMask for (total_q, total_k), of one batch element: its positions are packed ones. Default:
            none.
        deterministic: as in flash_attention. Default: follows torch.are_deterministic_algorithms_enabled().
        return_lse: also return lse. Default: False.
        backend: as in flash_attention. Default: "auto".
        config: as in flash_attention. Default: the tuned ones.

    Returns:
        o [total_q, heads, head_dim_v], of q's dtype and dense in q's axis order in memory; with return_lse (o, lse),
        lse [heads, total_q] ([total_q] for one head) in natural logarithm, float32 (float64 for float64). Both are
        differentiable with respect to q, k, v, bias, alibi_slopes and sinks.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        TypeError: score_mod, mask_mod or block_mask is of another type.
        NotImplementedError: what is asked for is not served, or not by the backend asked for.

    Source: Dao 2023, "FlashAttention-2", Algorithms 1 and 2, https://arxiv.org/abs/2307.08691.
    """
    for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if given is None:
            raise ValueError(f"{name} must be a torch.Tensor, got NoneType")
    check_flag("return_lse", return_lse)
    o, lse = attend_packed(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, window=window, q_offset=q_offset, scale=scale, mask=mask, bias=bias,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, score_mod=score_mod,
        mask_mod=mask_mod, block_mask=block_mask, deterministic=deterministic, backend=backend, config=config,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, ...]:
    """o [total_q, heads, head_dim_v] and lse [heads, total_q] of packed sequences; without the axis of heads as q."""
    if is_distributed(q, k, v):
        return attend_distributed(q, k, v, keywords)
    problem = Problem.of(q, k, v, **keywords)
    o, lse = attend(problem)
    o, lse = o.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (o.squeeze(1), lse.squeeze(0)) if problem.one_head else (o, lse)


def attend_nested(q: Any, k: Any, v: Any, keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of jagged nested tensors, nested themselves with q's lengths: a packed call on what they hold."""
    rows_q, rows_k, rows_v = (packed_rows(name, x, q) for name, x in (("q", q), ("k", k), ("v", v)))
    offsets_q, offsets_k, offsets_v = (x.offsets() for x in (q, k, v))
    if len(offsets_k) != len(offsets_q) or len(offsets_v) != len(offsets_q):
        got = len(offsets_k) - 1, len(offsets_v) - 1
        raise ValueError(f"k and v must have batch {len(offsets_q) - 1} like q, got {got[0]} and {got[1]}")
    if offsets_v is not offsets_k and not torch.equal(offsets_v, offsets_k):  # waits, where they were not made together
        raise ValueError("v must have sequences of the lengths of k's, got others")
    sized = keywords["mask"] is not None or keywords["bias"] is not None
    longest = [x._get_max_seqlen() if sized else 0 for x in (q, k)]
    o, lse = attend_packed(
        rows_q, rows_k, rows_v, cu_seqlens_q=offsets_q.to(torch.int32), cu_seqlens_k=offsets_k.to(torch.int32),
        max_seqlen_q=longest[0], max_seqlen_k=longest[1], **keywords,
    )  # fmt: skip
    known = {"min_seqlen": q._maybe_min_seqlen, "max_seqlen": q._maybe_max_seqlen}
    o = torch.nested.nested_tensor_from_jagged(o, offsets_q, **known)
    lse = torch.nested.nested_tensor_from_jagged(lse if q.dim() == 3 else lse.transpose(0, 1), offsets_q, **known)
    return (o, lse) if q.dim() == 3 else (o.transpose(1, 2), lse.transpose(1, 2))


def packed_rows(name: str, x: Any, q: Any) -> torch.Tensor:
    """What a nested tensor holds: [total, heads, head_dim], or [total, head_dim] of one of three axes."""
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_nested for tensor in (q, x)):
        raise ValueError(f"q, k and v must all be nested tensors where one is, got {name} or q that is not")
    if x.layout != torch.jagged:
        raise NotImplementedError(f"{name} is a nested tensor of layout {x.layout}; torch.jagged is served")
    if x.dim() not in (3, 4) or x.dim() != q.dim():
        expected = "3 or 4 dimensions" if x is q else f"{q.dim()} dimensions like q"
        raise ValueError(f"{name} must have {expected}, got {x.dim()}")
    if x._ragged_idx != x.dim() - 2:
        raise NotImplementedError(
            f"{name} must have its ragged axis last but one, [batch, heads, *, head_dim]; transpose(1, 2) makes it of "
            "[batch, *, heads, head_dim]"
        )
    if x.lengths() is not None:
        raise NotImplementedError(f"{name} is a nested tensor with gaps between its sequences; use {name}.contiguous()")
    rows: torch.Tensor = x.values()
    return rows if x.dim() == 3 else rows.transpose(0, 1)
