"""The oracle: attention as the mathematics says it, in float64, with every score in memory.

Tests and the bench compare with it; nothing that ships imports it. It is written to be read: `score` is all there is to
know about which number a query and a key share, `attention` about what becomes of it.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor


def visibility(seqlen_q: int, seqlen_k: int, causal: bool, q_offset: Tensor) -> Tensor:
    """Which keys each query sees: bool [batch, 1, seqlen_q, seqlen_k]; a feature that hides keys is one line here."""
    i = torch.arange(seqlen_q, device=q_offset.device)[:, None]
    j = torch.arange(seqlen_k, device=q_offset.device)[None, :]
    position = i + q_offset[:, None, None, None]  # of query i among the keys
    visible = torch.ones_like(position + j, dtype=torch.bool)
    if causal:
        visible = visible & (j <= position)
    return visible


def score(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """s [batch, heads, seqlen_q, seqlen_k], -inf where hidden; a feature that changes the score is one line here."""
    s = contract_head_dim(q, k, visible) * scale
    return s.masked_fill(~visible, float("-inf"))


def contract_head_dim(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """q_i . k_j for each visible pair."""
    if torch.isfinite(q).all() and torch.isfinite(k).all():
        return q @ k.mT
    # 0 * NaN is NaN, so a hidden NaN would come back through the gradient's products: select first, at n^2 d memory.
    pair = visible[..., None]
    return (q[:, :, :, None, :].where(pair, 0.0) * k[:, :, None, :, :].where(pair, 0.0)).sum(-1)


def contract_keys(p: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """sum_j p_ij v_j over the visible j."""
    if torch.isfinite(p).all() and torch.isfinite(v).all():
        return FiniteProduct.apply(p, v, visible)  # type: ignore[no-untyped-call, no-any-return]
    pair = visible[..., None]
    return (p[..., None].where(pair, 0.0) * v[:, :, None, :, :].where(pair, 0.0)).sum(-2)


class FiniteProduct(torch.autograd.Function):
    """p @ v, its gradient for v summed over visible pairs only: a NaN in do would reach hidden keys as 0 * NaN."""

    @staticmethod
    def forward(p: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return p @ v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, None]:
        p, v, visible = ctx.saved_tensors
        return do @ v.mT, contract_keys(p.mT, do, visible.mT), None

    @staticmethod
    def jvp(ctx: Any, dp: Tensor, dv: Tensor, _: None) -> Any:
        p, v, _ = ctx.saved_tensors
        return dp @ v + p @ dv


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., q_offset: int | Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., dropout_mask: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., q_offset: int | Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[True], dropout_mask: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention in float64 with all scores in memory: the definition the kernels are measured against.

    A query compares itself with the keys it sees, turns the scores into weights that sum to one, and returns the mean
    of the values under those weights:

        s_ij  = scale * q_i . k_j          where key j is visible to query i, else -inf
        lse_i = log sum_j exp(s_ij)
        p_ij  = exp(s_ij - lse_i)
        o_i   = sum_j p_ij v_j

    Its gradients, which autograd finds here and the kernels compute by formula (do, dlse: gradients of o and lse):

        dv_j  = sum_i p_ij do_i
        dp_ij = do_i . v_j
        ds_ij = p_ij (dp_ij - delta_i + dlse_i)      with delta_i = do_i . o_i
        dq_i  = scale * sum_j ds_ij k_j
        dk_j  = scale * sum_i ds_ij q_i

    A query that sees no key has o = 0, lse = -inf and gradients of zero. Sums run over visible pairs only, so a NaN in
    a hidden key or value reaches nobody, and one in a query or in do reaches its own row and the gradients of the keys
    it sees.

    Args:
        q: [batch, heads, seqlen_q, head_dim], any float dtype; upcast to float64.
        k: [batch, heads_k, seqlen_k, head_dim], heads_k divides heads: heads // heads_k queries share a key head.
        v: [batch, heads_k, seqlen_k, head_dim_v].
        causal: key j is visible to query i when j <= i + q_offset; default False.
        q_offset: position of the first query among the keys, int or int tensor (0-d or [batch]); default
            seqlen_k - seqlen_q, the queries are the last ones.
        scale: factor on q . k; default head_dim ** -0.5.
        return_lse: also return lse; default False.
        dropout_mask: factor on the weights after the softmax, broadcastable to [batch, heads, seqlen_q, seqlen_k]:
            0 where dropped, 1 / (1 - dropout_p) where kept; default None, no dropout.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v] in float64, and with return_lse the pair (o, lse), lse [batch, heads,
        seqlen_q] in float64, natural logarithm.

    Source:
        Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762), equation 1; gradients as in Dao et al. 2022,
        FlashAttention (arXiv 2205.14135), appendix B.2.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    batch, _, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    offset = torch.as_tensor(seqlen_k - seqlen_q if q_offset is None else q_offset, device=q.device).expand(batch)

    visible = visibility(seqlen_q, seqlen_k, causal, offset)
    s = score(q, k, scale, visible)
    empty = (s == float("-inf")).all(-1, keepdim=True)
    lse = s.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)  # finite, or -inf - -inf would be NaN in the next line
    p = (s - lse).exp()
    if dropout_mask is not None:
        p = p * dropout_mask
    o = contract_keys(p, v, visible)
    return (o, lse.masked_fill(empty, float("-inf")).squeeze(-1)) if return_lse else o
