"""The weights of attention as numbers to look at, or to return, without ever holding more of them than are asked for.

    p_ij = exp(s_ij - lse_i)

`attention_weights` is for looking: some query rows, or a map pooled over blocks, of any call of `flash_attention`, by
the torch backend's own score (`flash/scoring.py`). `weights_of` is what a module returns beside its output: all
weights, from the lse of the call that made the output, differentiable and traced by torch.compile.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.spec import accumulator_dtype
from .problem import Problem, Window
from .scoring import score
from .tiling import Call, Tile, keys_of, load_keys, load_rows, offsets_of, pairs_of_a_tile

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .mods import MaskMod, ScoreMod

PAIRS = 2**20  # of a query and a key in a block of weights_of, or one row's, where that is more


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: slice | Sequence[int] | None = None,
    pool: tuple[int, int] | None = None,
    causal: bool = False,
    window: Window = None,
    q_offset: int | Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score_mod: "ScoreMod | None" = None,
    mask_mod: "MaskMod | None" = None,
    block_mask: "BlockMask | None" = None,
) -> Tensor:
    """Exact attention weights of some query rows, or of all of them pooled over blocks, for looking at patterns.

        p_ij  = exp(s_ij - lse_i)                                  s and lse as flash_attention defines them
        P_IJ  = 1 / |I| sum_{i in I} sum_{j in J} p_ij             pooled over blocks I of rows and J of keys

    What is hidden has weight 0, as has every key of a query that sees none; a sink takes its share of a row's sum of 1.
    Dropout has no part in it, and the weights carry no gradient. Memory beside the result does not grow with rows.

    Args:
        q: [batch, heads, seqlen_q, head_dim], or [batch, seqlen_q, head_dim] for one head; as in flash_attention.
        k: [batch, heads_k, seqlen_k, head_dim].
        rows: which queries: a slice, or their indices in any order, negative ones counted from the end. Default: all,
            which is seqlen_q * seqlen_k numbers for every head unless they are pooled.
        pool: (m, n): m of the rows and n keys to a block; the last ones may be smaller. Default: no pooling.
        causal, window, q_offset, scale, mask, bias, alibi_slopes, softcap, sinks, score_mod, mask_mod, block_mask: as
            in flash_attention; positions and indices are those of all queries, whichever rows are asked for.

    Returns:
        [batch, heads, rows, seqlen_k], or pooled [batch, heads, ceil(rows / m), ceil(seqlen_k / n)], whose rows sum to
        1 too; without the axis of heads as q. float32 (float64 for float64).

    Raises:
        ValueError: an argument is wrong; the message names it.

    Source: Dao et al. 2022, "FlashAttention", Algorithm 4, https://arxiv.org/abs/2205.14135.
    """
    problem = Problem.of(
        q, k, k, causal=causal, window=window, q_offset=q_offset, scale=scale, mask=mask, bias=bias,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, score_mod=score_mod, mask_mod=mask_mod,
        block_mask=block_mask,
    )  # fmt: skip
    call = Call(problem.q, problem.k, problem.v, problem.mods, problem.spec, problem.scale, problem.positions)
    batch, heads, seqlen_q, _ = call.q.shape
    chosen = rows_of(rows, seqlen_q)
    m, n = pool_of(pool)
    shape = (batch, heads, -(-len(chosen) // m), -(-call.k.shape[2] // n))
    found = torch.zeros(shape, dtype=accumulator_dtype(call.q), device=call.q.device)
    with torch.no_grad():
        for first, tile in tiles_of(call, chosen):
            p = weights_of_tile(call, tile)
            out = found[tile.b, tile.heads]
            if pool is None:
                out[:, first : first + p.shape[1], tile.cols] = p
                continue
            at = torch.arange(first, first + p.shape[1], device=p.device) // m
            width = p.new_zeros(*p.shape[:2], shape[3]).index_add_(2, tile.keys(p.device) // n, p)
            out.index_add_(1, at, width)
        if m > 1:
            sizes = torch.full((shape[2], 1), m, dtype=found.dtype, device=found.device)
            sizes[-1:] = len(chosen) - m * (shape[2] - 1)
            found /= sizes
    return found.squeeze(1) if problem.one_head else found


def rows_of(rows: Any, seqlen_q: int) -> list[int]:
    """The indices of the rows, from 0 up to seqlen_q."""
    if rows is None or isinstance(rows, slice):
        return list(range(seqlen_q)[rows or slice(None)])
    indices = rows.tolist() if isinstance(rows, Tensor) else rows
    if not isinstance(indices, Sequence) or any(type(row) is not int for row in indices):
        raise ValueError(f"rows must be a slice or whole numbers, got {rows!r}")
    if any(not -seqlen_q <= row < seqlen_q for row in indices):
        raise ValueError(f"rows must be within {-seqlen_q} and {seqlen_q - 1}, got {indices}")
    return [row % seqlen_q for row in indices]


def pool_of(pool: Any) -> tuple[int, int]:
    """(m, n), (1, 1) without pooling."""
    if pool is None:
        return 1, 1
    if not (isinstance(pool, tuple) and len(pool) == 2 and all(type(size) is int and size > 0 for size in pool)):
        raise ValueError(f"pool must be two whole numbers > 0, rows and keys in a block, got {pool!r}")
    return pool


def tiles_of(call: Call, chosen: list[int]) -> Iterator[tuple[int, Tile]]:
    """Tiles of the chosen rows, each with the place of its first row among them; none without keys."""
    heads_k, seqlen_k = call.k.shape[1:3]
    if not heads_k or not seqlen_k:
        return
    group = call.q.shape[1] // heads_k
    most = max(1, pairs_of_a_tile(call) // seqlen_k)
    first = 0
    while first < len(chosen):
        last = first + 1
        while last < min(len(chosen), first + most) and chosen[last] == chosen[last - 1] + 1:
            last += 1
        rows = slice(chosen[first], chosen[last - 1] + 1)
        for b, offset in enumerate(offsets_of(call)):
            cols, key_blocks = keys_of(call, b, rows, offset)
            for h in range(heads_k):
                heads = slice(h * group, (h + 1) * group)
                tile = Tile(b, slice(h, h + 1), heads, rows, cols, key_blocks, rows.start + offset)
                if tile.shape[2] > 0:
                    yield first, tile
        first = last


def weights_of_tile(call: Call, tile: Tile) -> Tensor:
    """The weights of a tile, [heads, rows, cols]; it holds all keys of its rows."""
    dtype = accumulator_dtype(call.q)
    s = score(call, tile, load_rows(call.q, tile, dtype), load_keys(call.k, tile, dtype)).s
    m = s.amax(-1, keepdim=True)
    sink = None if call.mods.sinks is None else call.mods.sinks[tile.heads].to(dtype)[:, None, None]
    m = m if sink is None else torch.maximum(m, sink)
    m = m.masked_fill(m == float("-inf"), 0.0)  # a row without keys stays finite
    p = s.sub_(m).exp_()
    l = p.sum(-1, keepdim=True)
    l = l if sink is None else l + (sink - m).exp()
    return p.div_(l.masked_fill(l == 0, 1.0))


def weights_of(
    q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, average: bool
) -> Tensor:
    """The weights of a call whose lse is known, differentiable with respect to q, k, lse and bias.

        p_ij = exp(scale * q_i . k_j + bias_ij - lse_i)            0 where the mask hides

    Plain torch and not the score of `flash/scoring.py`, which looks at its tiles: torch.compile must trace it. It goes
    through a block of rows at a time, forward and backward.

    Args:
        q: [batch, heads, seqlen_q, head_dim].
        k: [batch, heads, seqlen_k, head_dim].
        lse: [batch, heads, seqlen_q], of the same call.
        mask: bool, True = visible, or None; four axes that broadcast to [batch, heads, seqlen_q, seqlen_k].
        bias: float, likewise.
        scale: factor of q . k.
        average: take the mean over heads.

    Returns:
        [batch, seqlen_q, seqlen_k] if average, else [batch, heads, seqlen_q, seqlen_k]; of q's dtype.
    """
    device = q.device.type
    with nullcontext() if not torch.amp.is_autocast_available(device) else torch.autocast(device, enabled=False):
        found: Tensor = Weights.apply(q, k, lse, mask, bias, scale, average)  # type: ignore[no-untyped-call]
    return found


class Weights(torch.autograd.Function):
    """weights_of, whose backward computes the weights again."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, average: bool
    ) -> Tensor:
        batch, heads, seqlen_q, _ = q.shape
        shape = (batch, seqlen_q, k.shape[2]) if average else (batch, heads, seqlen_q, k.shape[2])
        found = q.new_empty(shape)
        for rows in blocks(q, k):
            p = weights_of_rows(q, k, lse, mask, bias, scale, rows)
            found[..., rows, :] = p.mean(1) if average else p
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.average = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, mask, bias = ctx.saved_tensors
        dq, dk, dlse = q.new_empty(q.shape), torch.zeros_like(k, dtype=lse.dtype), lse.new_empty(lse.shape)
        dbias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[4] else None
        for rows in blocks(q, k):
            p = weights_of_rows(q, k, lse, mask, bias, ctx.scale, rows)
            ds = p * (do[:, None, rows] / q.shape[1] if ctx.average else do[:, :, rows])
            dlse[:, :, rows] = -ds.sum(-1)
            dq[:, :, rows] = (ds @ k.to(ds.dtype) * ctx.scale).to(q.dtype)
            dk += ds.mT @ q[:, :, rows].to(ds.dtype) * ctx.scale
            if dbias is not None:
                part = rows if bias.shape[2] > 1 else slice(None)
                dbias[:, :, part] += ds.sum_to_size(dbias[:, :, part].shape)
        return dq, dk.to(k.dtype), dlse, None, None if dbias is None else dbias.to(bias.dtype), None, None


def blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """All rows, some at a time."""
    step = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))


def weights_of_rows(
    q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, rows: slice
) -> Tensor:
    """The weights of a block of rows, [batch, heads, rows, seqlen_k], of lse's dtype."""
    s = q[:, :, rows].to(lse.dtype) @ k.mT.to(lse.dtype) * scale
    if bias is not None:
        s = s + (bias[:, :, rows] if bias.shape[2] > 1 else bias)
    own = lse[:, :, rows, None]
    p = (s - own.masked_fill(own == float("-inf"), 0.0)).exp()
    if mask is not None:
        p = p.masked_fill(~(mask[:, :, rows] if mask.shape[2] > 1 else mask), 0.0)
    return p
