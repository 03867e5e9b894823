"""Exact attention in memory that grows with the sequence: what the user calls."""

from typing import Any

import torch

from .autograd import attend
from .problem import ConfigLike, Problem, check_flag


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_mask: Any = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    config: ConfigLike = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention, forward and backward, without the [seqlen_q, seqlen_k] matrix.

        s_ij  = scale * q_i . k_j          for the keys j that query i sees
        lse_i = log sum_j exp(s_ij)
        o_i   = sum_j exp(s_ij - lse_i) v_j

    A query that sees no key has o = 0, lse = -inf and zero gradients. Empty batches and zero-length q or k are served.

    Args:
        q: [batch, heads, seqlen_q, head_dim], float16, bfloat16, float32 or float64; head_dim from 1 to 512; any
            strides. [batch, seqlen_q, head_dim] is one head, and comes back so.
        k: [batch, heads_k, seqlen_k, head_dim], of q's dtype and device. heads_k divides heads: head h of q attends to
            head h // (heads // heads_k) of k and v (grouped-query and multi-query attention), which are never repeated
            in memory.
        v: [batch, heads_k, seqlen_k, head_dim_v], of q's dtype and device; head_dim_v from 1 to 512.
        causal: key j is visible to query i when j <= i + q_offset. Default: every key is visible.
        window: not served yet.
        q_offset: position of the first query among the keys: an int, or an int32 or int64 tensor of shape [] or
            [batch], read on the device. Default: seqlen_k - seqlen_q, the queries being the last ones.
        scale: factor of q.k, any finite float. Default: head_dim ** -0.5.
        mask: not served yet.
        bias: not served yet.
        alibi_slopes: not served yet.
        softcap: not served yet.
        sinks: not served yet.
        dropout_p: only 0.0 is served yet.
        score_mod: not served yet.
        mask_mod: not served yet.
        block_mask: not served yet.
        deterministic: every backend here repeats bit for bit, so that any value gives the same. Default: follows
            torch.are_deterministic_algorithms_enabled().
        return_lse: also return lse. Default: False.
        backend: "auto", "triton", "hopper" or "torch". One asked for by name never falls back. Default: "auto", which
            is Triton on a GPU that it serves and torch elsewhere.
        config: tile sizes, a flash.Config for the forward or a dict of them for "forward", "dkdv" and "dq". The torch
            backend has no tiles and ignores it. Default: the tuned ones (see flash.info).

    Returns:
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype and dense in q's axis order in memory; with return_lse (o,
        lse), lse [batch, heads, seqlen_q] in natural logarithm, float32 (float64 for float64). Both are differentiable
        with respect to q, k and v.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        NotImplementedError: what is asked for is not served, or not by the backend asked for.

    Source: Dao 2023, "FlashAttention-2", Algorithms 1 and 2, https://arxiv.org/abs/2307.08691.
    """
    problem = Problem.of(
        q,
        k,
        v,
        causal=causal,
        window=window,
        q_offset=q_offset,
        scale=scale,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=block_mask,
        deterministic=deterministic,
        backend=backend,
        config=config,
    )
    check_flag("return_lse", return_lse)
    o, lse = attend(problem)
    if problem.one_head:
        o, lse = o.squeeze(1), lse.squeeze(1)
    return (o, lse) if return_lse else o
