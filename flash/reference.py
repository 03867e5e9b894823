"""The oracle: attention as the mathematics says it, in float64, with every score in memory.

Tests and the bench compare with it; nothing that ships imports it. It is written to be read: `score` is all there is to
know about which number a query and a key share, `visibility` about who sees whom, `attention` about what becomes of it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

Window = int | tuple[int | None, int | None] | None


class Pairs(NamedTuple):
    """All pairs of a query and a key, as integer tensors that broadcast to [batch, heads, seqlen_q, seqlen_k]."""

    b: Tensor
    h: Tensor
    i: Tensor
    j: Tensor
    position: Tensor  # of query i among the keys

    @classmethod
    def of(cls, q: Tensor, k: Tensor, q_offset: int | Tensor | None) -> "Pairs":
        """The pairs of q [batch, heads, seqlen_q, head_dim] and k."""
        (batch, heads, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
        b, h, i, j = (torch.arange(n, device=q.device) for n in (batch, heads, seqlen_q, seqlen_k))
        offset = torch.as_tensor(seqlen_k - seqlen_q if q_offset is None else q_offset, device=q.device).expand(batch)
        b, h, i = b[:, None, None, None], h[:, None, None], i[:, None]
        return cls(b, h, i, j, i + offset[:, None, None, None])


def visibility(
    at: Pairs,
    *,
    causal: bool = False,
    window: Window = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask_mod: Any = None,
    block_mask: Any = None,
) -> Tensor:
    """Which keys each query sees: bool [batch, heads or 1, seqlen_q, seqlen_k]; what hides keys is a line or two here.

    A key has to pass every rule. Of a bias, -inf and the lowest number of its own dtype hide.
    """
    left, right = (window, window) if isinstance(window, int) else (None, None) if window is None else window
    visible = torch.ones_like(at.position + at.j, dtype=torch.bool)
    if causal:
        visible = visible & (at.j <= at.position)
    if left is not None:
        visible = visible & (at.j >= at.position - left)
    if right is not None:
        visible = visible & (at.j <= at.position + right)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & ~(bias <= torch.finfo(bias.dtype).min)
    if mask_mod is not None:
        visible = visible & mask_mod.torch_fn(at.b, at.h, at.i, at.j, mask_mod.args)
    if block_mask is not None:
        visible = visible & visible_blocks(block_mask, at.i, at.j)
    return visible


def visible_blocks(block_mask: Any, i: Tensor, j: Tensor) -> Tensor:
    """What a BlockMask shows: whole blocks, and those in part where its mask_mod says; bool [B, H, queries, keys]."""
    b, h = (torch.arange(n, device=i.device) for n in block_mask.kv_num_blocks.shape[:2])
    b, h = b[:, None, None, None], h[:, None, None]
    rows, keys = block_mask.BLOCK_SIZE
    partly = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    visible = partly[b, h, i // rows, j // keys] & block_mask.mask_mod(b, h, i, j)
    if block_mask.full_kv_num_blocks is not None:
        whole = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        visible = visible | whole[b, h, i // rows, j // keys]
    return visible  # type: ignore[no-any-return]


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which key blocks are among the first counts[...] of indices[..., key blocks]: bool of indices' shape."""
    entries = torch.arange(indices.shape[-1], device=indices.device)
    valid = entries < counts[..., None]
    return torch.zeros_like(indices).scatter_add(-1, indices.where(valid, 0).long(), valid.to(indices.dtype)) > 0


def score(
    q: Tensor,
    k: Tensor,
    scale: float,
    at: Pairs,
    visible: Tensor,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    score_mod: Any = None,
) -> Tensor:
    """s [batch, heads, seqlen_q, seqlen_k], -inf where hidden; what changes the score is a line or two here."""
    s = contract_head_dim(q, k, visible) * scale
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    if bias is not None:
        s = s + bias
    if alibi_slopes is not None:
        s = s - alibi_slopes[..., None, None] * (at.position - at.j).abs()
    if score_mod is not None:
        # a hidden score may be NaN (as bias may), and so may its derivative: the function sees 0 there
        s = score_mod.torch_fn(s.where(visible, 0.0), at.b, at.h, at.i, at.j, score_mod.args)
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
    """p @ v, its derivatives in v summed over visible pairs only: a NaN in do would reach hidden keys as 0 * NaN, and
    one in v's tangent the rows that it is hidden from."""

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
        p, v, visible = ctx.saved_tensors
        return dp @ v + contract_keys(p, dv, visible)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., q_offset: int | Tensor | None = ...,
    scale: float | None = ..., mask: Tensor | None = ..., bias: Tensor | None = ..., alibi_slopes: Tensor | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., score_mod: Any = ..., mask_mod: Any = ...,
    block_mask: Any = ..., return_lse: Literal[False] = ..., dropout_mask: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: Window = ..., q_offset: int | Tensor | None = ...,
    scale: float | None = ..., mask: Tensor | None = ..., bias: Tensor | None = ..., alibi_slopes: Tensor | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., score_mod: Any = ..., mask_mod: Any = ...,
    block_mask: Any = ..., return_lse: Literal[True], dropout_mask: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_mask: Any = None,
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention in float64 with all scores in memory: the definition the kernels are measured against.

    A query compares itself with the keys it sees, turns the scores into weights that sum to one, and returns the mean
    of the values under those weights. With position_i = i + q_offset:

        s_ij  = scale * q_i . k_j                             where key j is visible to query i, else -inf
        s_ij <- softcap * tanh(s_ij / softcap)                each where it is given
        s_ij <- s_ij + bias_ij
        s_ij <- s_ij - alibi_slope * |position_i - j|
        s_ij <- score_mod(s_ij, b, h, i, j)
        lse_i = log (exp(sink) + sum_j exp(s_ij))             without a sink the sum alone
        p_ij  = exp(s_ij - lse_i)
        o_i   = sum_j p_ij dropout_ij v_j

    Its gradients, which autograd finds here and the kernels compute by formula (do, dlse: gradients of o and lse):

        dv_j  = sum_i p_ij dropout_ij do_i
        dp_ij = dropout_ij do_i . v_j
        ds_ij = p_ij (dp_ij - delta_i + dlse_i)               with delta_i = do_i . o_i
        dsink = sum_i exp(sink - lse_i) (dlse_i - delta_i)
        dbias = ds and dslope = -sum_ij ds_ij |position_i - j|, before score_mod's derivative: ds times it
        dq_i  = scale * sum_j ds_ij k_j                       ds times the derivatives of score_mod and of softcap
        dk_j  = scale * sum_i ds_ij q_i

    A query that sees no key has o = 0, lse = -inf (or the sink) and gradients of zero. Sums run over visible pairs
    only, so a NaN in a hidden key, value or bias reaches nobody, and one in a query or in do reaches its own row and
    the gradients of the keys it sees.

    Args:
        q: [batch, heads, seqlen_q, head_dim], any float dtype; upcast to float64.
        k: [batch, heads_k, seqlen_k, head_dim], heads_k divides heads: heads // heads_k queries share a key head.
        v: [batch, heads_k, seqlen_k, head_dim_v].
        causal: key j is visible to query i when j <= position_i; default False.
        window: (left, right), key j is visible when -left <= j - position_i <= right, None is no bound; an int is
            both. Default None.
        q_offset: position of the first query among the keys, int or int tensor (0-d or [batch]); default
            seqlen_k - seqlen_q, the queries are the last ones.
        scale: factor on q . k; default head_dim ** -0.5.
        mask: bool, True where visible, broadcastable to [batch, heads, seqlen_q, seqlen_k]; default None.
        bias: any float dtype, broadcastable likewise; -inf, or its dtype's lowest number, hides. Default None.
        alibi_slopes: any float dtype, [heads] or [batch, heads]; default None.
        softcap: bound of the scaled score; default None.
        sinks: any float dtype, [heads]: one more logit in the softmax's sum, without a value; default None.
        score_mod: a `flash.mods.ScoreMod`, of which torch_fn and args are used; default None.
        mask_mod: a `flash.mods.MaskMod`, likewise; default None.
        block_mask: a `torch.nn.attention.flex_attention.BlockMask`; default None.
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
    scale = q.shape[3] ** -0.5 if scale is None else scale

    at = Pairs.of(q, k, q_offset)
    visible = visibility(
        at, causal=causal, window=window, mask=mask, bias=bias, mask_mod=mask_mod, block_mask=block_mask
    )
    bias, alibi_slopes = (None if x is None else x.double() for x in (bias, alibi_slopes))
    s = score(q, k, scale, at, visible, softcap=softcap, bias=bias, alibi_slopes=alibi_slopes, score_mod=score_mod)
    logits = s
    if sinks is not None:
        logits = torch.cat((s, sinks.double()[:, None, None].expand(*s.shape[:3], 1)), -1)
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    lse = logits.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)  # finite, or -inf - -inf would be NaN in p
    p = (s - lse).exp()
    if dropout_mask is not None:
        p = p * dropout_mask
    o = contract_keys(p, v, visible)
    return (o, lse.masked_fill(empty, float("-inf")).squeeze(-1)) if return_lse else o


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    return_lse: Literal[False] = ..., **options: Any,
) -> Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    return_lse: Literal[True], **options: Any,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed sequences, each to itself: `attention` on one after the other.

        o[starts_q[b] : starts_q[b + 1]] = attention of those queries to keys starts_k[b] up to starts_k[b + 1]

    The starts are the running maximum of cu_seqlens, clamped to 0 and the total. A sequence with an end that this
    changes, or that is longer than its axis of mask, bias or dropout_mask, is bad: its o, lse and the gradients of its
    queries, keys and values are NaN, and it adds nothing to other gradients. Rows of no sequence have o = 0, lse = -inf
    and gradients of zero.

    Args:
        q: [total_q, heads, head_dim], any float dtype; upcast to float64.
        k: [total_k, heads_k, head_dim].
        v: [total_k, heads_k, head_dim_v].
        cu_seqlens_q: where the queries of each sequence start, and the last ends: any integer dtype, [batch + 1].
        cu_seqlens_k: likewise for keys.
        return_lse: also return lse; default False.
        options: other keywords of `attention`. Axes of batch count sequences; mask, bias, dropout_mask and user
            functions have indices local to a sequence, a block_mask has those of the packed rows. q_offset is by
            default seqlen_k - seqlen_q of each sequence.

    Returns:
        o [total_q, heads, head_dim_v] in float64, and with return_lse the pair (o, lse), lse [heads, total_q].

    Source: Dao 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691, whose library has packed calls.
    """

    def attend(*operands: Tensor, **local: Any) -> tuple[Tensor, Tensor]:
        return attention(*operands, return_lse=True, **local)

    o, lse = one_by_one(attend, q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    return (o, lse) if return_lse else o


def one_by_one(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(o, lse) of packed sequences by a dense attend(q, k, v, **options) -> (o, lse), as in `attention_varlen`."""
    starts_q, bad_q = safe_starts(cu_seqlens_q, q.shape[0])
    starts_k, bad_k = safe_starts(cu_seqlens_k, k.shape[0])
    options = dict(options)
    blocks = options.pop("block_mask", None)
    if blocks is not None:
        i, j = (torch.arange(x.shape[0], device=x.device) for x in (q, k))
        blocks = visible_blocks(blocks, i[:, None], j)
    os, lses, owners = [], [], []
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        operands = [x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys))]
        lengths = rows.stop - rows.start, keys.stop - keys.start
        if bad_q[b] or bad_k[b] or too_long(options, lengths):
            o, lse = attend(*(Bad.apply(x) for x in operands))  # type: ignore[no-untyped-call]
            o, lse = o * float("nan"), lse * float("nan")
        else:
            local = {name: of_sequence(name, x, b, lengths) for name, x in options.items()}
            if blocks is not None:
                shown = blocks[:, :, rows, keys]
                local["mask"] = shown if local.get("mask") is None else shown & local["mask"]
            o, lse = attend(*operands, **local)
        os.append(o[0].transpose(0, 1))
        lses.append(lse[0])
        owners.append(rows)
    o = os[0].new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = lses[0].new_full((q.shape[1], q.shape[0]), float("-inf"))
    for rows, o_part, lse_part in zip(owners, os, lses, strict=True):
        o[rows], lse[:, rows] = o_part, lse_part
    return o, lse


class Bad(torch.autograd.Function):
    """A bad sequence's operand: its gradient is NaN, and so is its tangent."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return torch.full_like(dx, float("nan"))

    @staticmethod
    def jvp(ctx: Any, tx: Tensor) -> Tensor:
        return torch.full_like(tx, float("nan"))


def safe_starts(cu_seqlens: Tensor, total: int) -> tuple[list[int], list[bool]]:
    """Where sequences start and the last ends, never decreasing and within the total, and which of them are bad."""
    starts = cu_seqlens.cummax(0).values.clamp(0, total)
    changed = starts != cu_seqlens
    return starts.tolist(), (changed[:-1] | changed[1:]).tolist()


PAIRED = ("mask", "bias", "dropout_mask")  # operands with axes of queries and keys


def too_long(options: dict[str, Any], lengths: tuple[int, int]) -> bool:
    """Whether an operand lacks queries or keys for a sequence of these lengths."""
    shapes = [options[name].shape[-2:] for name in PAIRED if options.get(name) is not None]
    return any(1 != axis < length for shape in shapes for axis, length in zip(shape[::-1], lengths[::-1], strict=False))


def of_sequence(name: str, x: Any, b: int, lengths: tuple[int, int]) -> Any:
    """An option of a packed call as sequence b, with these lengths of queries and keys, has it."""
    if name in PAIRED and x is not None:
        x = x[(None,) * (4 - x.dim())]
        x = x[b : b + 1] if x.shape[0] > 1 else x
        x = x[:, :, : lengths[0]] if x.shape[2] > 1 else x
        return x[..., : lengths[1]] if x.shape[3] > 1 else x
    if name == "alibi_slopes" and x is not None and x.dim() == 2:
        return x[b if x.shape[0] > 1 else 0]
    if name == "q_offset" and isinstance(x, Tensor) and x.dim():
        return x[b if x.shape[0] > 1 else 0]
    if name in ("score_mod", "mask_mod") and x is not None:

        def numbered(*args: Any) -> Any:  # (s,) b, h, i, j, args: the dense call counts b from 0
            return x.torch_fn(*args[:-5], args[-5] + b, *args[-4:])

        return SimpleNamespace(torch_fn=numbered, args=x.args)
    return x
