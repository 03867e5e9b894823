"""Attention to a sequence whose shards lie on the ranks of a group, by an exchange of rows for heads.

Each rank gets all rows of some heads, attends to the whole sequence as if it were alone, and gives the rows back
(Jacobs et al. 2023, arXiv 2309.14509). Where ranks are more than key heads, several of them get the same one. The
backward pass fetches its operands once more, so that what is kept between the passes is the shards alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .kernels.spec import Gradients, accumulator_dtype, dense_like
from .links import Links
from .parts import Extent, mod_of_part
from .problem import Problem
from .ring_call import DIFFERENTIABLE, Call, Layout, problem_of
from .ring_methods import Output
from .shards import Piece


class Heads(NamedTuple):
    """The query heads of a rank, and the key heads that they share."""

    q: slice
    k: slice


def unserved(call: Call, layout: Layout, world_size: int) -> str | None:
    """Why heads cannot be dealt out to so many ranks, or None where they can."""
    heads, heads_k = call.q.shape[1], call.k.shape[1]
    if heads % world_size:
        return f"{heads} heads do not divide among {world_size} ranks"
    own, group = heads // world_size, heads // max(heads_k, 1)
    if own and own % group and group % own:
        return f"groups of {group} heads that share a key head do not divide among {world_size} ranks"
    for name, rows in (("mask", layout.mask), ("bias", layout.bias)):
        if rows:
            return f"{name} has an axis of queries, of which each rank has its own only"
    return None


def heads_of(call: Call, world_size: int) -> list[Heads]:
    """The heads of each rank."""
    own, group = call.q.shape[1] // world_size, call.q.shape[1] // max(call.k.shape[1], 1)
    starts = [rank * own for rank in range(world_size)]
    return [Heads(slice(n, n + own), slice(n // group, -(-(n + own) // group)) if own else slice(0, 0)) for n in starts]


def to_heads(links: Links, x: Tensor, heads: list[slice], pieces: list[list[Piece]]) -> Tensor:
    """All rows of this rank's heads, [batch, own heads, total, d], from x [batch, heads, this rank's rows, d]."""
    batch, _, _, d = x.shape
    own = heads[links.rank].stop - heads[links.rank].start
    lengths = [sum(piece.stop - piece.start for piece in of_rank) for of_rank in pieces]
    receives = [(peer, x.new_empty(batch, own, length, d)) for peer, length in enumerate(lengths)]
    links.exchange([(peer, x[:, of_peer].contiguous()) for peer, of_peer in enumerate(heads)], receives)
    whole = x.new_empty(batch, own, sum(lengths), d)
    for (_, rows), of_rank in zip(receives, pieces, strict=True):
        for piece in of_rank:
            whole[:, :, piece.start : piece.stop] = rows[:, :, piece.local]
    return whole


def to_rows(links: Links, whole: Tensor, heads: list[slice], pieces: list[list[Piece]], total: Tensor) -> None:
    """Add to `total` [batch, heads, this rank's rows, d] what the ranks have of these rows, in the order of ranks."""
    sends, receives = [], []
    for peer, (places, own) in enumerate(zip(pieces, heads, strict=True)):
        parts = [whole[:, :, piece.start : piece.stop] for piece in places]
        sends.append((peer, torch.cat(parts, 2) if parts else whole[:, :, :0].contiguous()))
        receives.append((peer, whole.new_empty(total.shape[0], own.stop - own.start, *total.shape[2:])))
    links.exchange(sends, receives)
    for (_, part), own in zip(receives, heads, strict=True):
        total[:, own] += part


def problem(links: Links, call: Call, layout: Layout) -> Problem:
    """This rank's heads of the whole sequence, as a Problem."""
    heads = heads_of(call, links.world_size)
    own, of_q, of_k = heads[links.rank], [x.q for x in heads], [x.k for x in heads]
    q = to_heads(links, call.q, of_q, layout.queries)
    k, v = (to_heads(links, x, of_k, layout.keys) for x in (call.k, call.v))
    given = {name: x for name, x in call.tensors.items() if name != "seed"}
    given |= {name: operand_of(name, x, own.q) for name, x in given.items() if name in ("mask", *DIFFERENTIABLE)}
    extents = call.extents(Extent(0, layout.total_q, layout.total_q), own.q)
    mods = {name: mod_of_part(mod, extents) for name, mod in call.mods.items()}
    found = problem_of(q, k, v, **call.plain, **given, **mods, config=call.config or None)
    return call.placed(found, 0, extents)


def operand_of(name: str, x: Tensor, heads: slice) -> Tensor:
    """An operand's part for some heads."""
    if name == "sinks":
        return x[heads]
    if name == "alibi_slopes":
        return x[..., heads]
    return x[:, heads] if x.shape[1] > 1 else x


def forward(links: Links, call: Call, layout: Layout) -> tuple[Tensor, Tensor]:
    """o [batch, heads, seqlen_q, head_dim_v], of q's dtype and order in memory, and lse of this rank's rows."""
    o_heads, lse_heads = dispatch.forward(problem(links, call, layout))
    of_q = [x.q for x in heads_of(call, links.world_size)]
    o = dense_like(call.q, call.v.shape[3]).zero_()
    lse = call.q.new_zeros((*call.q.shape[:3], 1), dtype=lse_heads.dtype)
    to_rows(links, o_heads, of_q, layout.queries, o)
    to_rows(links, lse_heads.unsqueeze(3), of_q, layout.queries, lse)
    return o, lse.squeeze(3)


def backward(links: Links, call: Call, layout: Layout, output: Output, needs: Gradients) -> list[Tensor | None]:
    """The wanted gradients, as `ring_methods.backward` gives them."""
    heads = heads_of(call, links.world_size)
    own, of_q, of_k = heads[links.rank].q, [x.q for x in heads], [x.k for x in heads]
    whole = problem(links, call, layout)
    o, do = (to_heads(links, x, of_q, layout.queries) for x in (output.o, output.do))
    # sent whether there is one or not: what ranks send each other must not hang on the loss of one of them
    of_lse = torch.zeros_like(output.lse) if output.dlse is None else output.dlse
    dlse: Tensor | None
    lse, dlse = (
        to_heads(links, x.unsqueeze(3), of_q, layout.queries).squeeze(3)
        for x in (output.lse, of_lse.to(output.lse.dtype))
    )
    if dlse.device.type == "cpu" and not bool(dlse.any()):
        dlse = None  # which torch's own kernels serve
    found = dispatch.backward(whole, do, dlse, o, lse, needs)
    grads: list[Tensor | None] = []
    for x, gradient, places, pieces in zip(
        (call.q, call.k, call.v), found[:3], (of_q, of_k, of_k), (layout.queries, layout.keys, layout.keys), strict=True
    ):
        if gradient is None:
            grads.append(None)
            continue
        total = torch.zeros_like(x, dtype=accumulator_dtype(x))
        to_rows(links, gradient.to(total.dtype), places, pieces, total)
        grads.append(torch.empty_like(x).copy_(total))
    for name, gradient in zip(DIFFERENTIABLE, found[3:], strict=True):
        if gradient is None:
            grads.append(None)
            continue
        operand = torch.zeros_like(call.tensors[name])
        there = operand_of(name, operand, own)
        there.copy_(gradient.view_as(there))
        grads.append(operand)
    return grads
