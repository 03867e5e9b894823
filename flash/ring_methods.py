"""Attention to a sequence whose shards lie on the ranks of a group, forward and backward: a ring, or all keys at once.

    ring          keys and values travel from rank to rank while each rank attends to those that it holds (Liu et al.
                  2023, arXiv 2310.01889); in the backward pass their gradients travel behind them, and then home
    all_gather    each rank fetches all the keys that its queries see, and attends to them in as few calls as can be

A rank computes (o, lse) of its rows part by part and merges them; backward, each part is given the final o and lse, so
that its gradients add up to those of the whole (Dao et al. 2022, algorithm 4). Sums are in float32 (float64 for
float64) and in an order that the layout fixes: calls repeat to the bit. `flash/ulysses.py` is the third way.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .kernels.spec import Gradients, accumulator_dtype, dense_like
from .links import Block, Links, Post, ring_pass
from .merge import join
from .parts import columns
from .problem import Problem
from .ring_call import Call, Layout
from .shards import Piece, sees


class Keys(NamedTuple):
    """Keys and values [batch, heads_k, n, head_dim or head_dim_v] of some pieces, or their gradients."""

    pieces: list[Piece]
    k: Tensor
    v: Tensor


class Rows(NamedTuple):
    """A rank's rows of one piece, as the Problem with all keys that they are part of."""

    piece: Piece
    problem: Problem


class Output(NamedTuple):
    """What the forward returned for a rank's rows, and the gradients of it."""

    o: Tensor
    lse: Tensor
    do: Tensor
    dlse: Tensor | None


def rows_of(links: Links, call: Call, layout: Layout) -> list[Rows]:
    """The rows of this rank."""
    return [Rows(piece, call.problem(piece, layout)) for piece in layout.queries[links.rank]]


def pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one row of numbers, which is how they travel."""
    return torch.cat([k.flatten(), v.flatten()])


def unpack(flat: Tensor, call: Call, layout: Layout, source: int) -> Keys:
    """A rank's keys and values, views of what `pack` made of them."""
    shapes = [(*x.shape[:2], layout.lengths_k[source], x.shape[3]) for x in (call.k, call.v)]
    k, v = flat.split([torch.Size(shape).numel() for shape in shapes])
    return Keys(layout.keys[source], k.view(shapes[0]), v.view(shapes[1]))


def numbers(call: Call, layout: Layout) -> list[int]:
    """How many numbers the keys and values of each rank are."""
    each = call.k.shape[0] * call.k.shape[1] * (call.k.shape[3] + call.v.shape[3])
    return [each * length for length in layout.lengths_k]


# forward


def forward(method: str, links: Links, call: Call, layout: Layout) -> tuple[Tensor, Tensor]:
    """o [batch, heads, seqlen_q, head_dim_v], of q's dtype and order in memory, and lse of this rank's rows."""
    dtype = accumulator_dtype(call.q)
    o = dense_like(call.q, call.v.shape[3], dtype=dtype).zero_()
    lse = call.q.new_full(call.q.shape[:3], float("-inf"), dtype=dtype)
    rows = rows_of(links, call, layout)
    totals = [(o[:, :, row.piece.local], lse[:, :, row.piece.local]) for row in rows]
    found = passing(links, call, layout) if method == "ring" else fetched(links, call, layout)
    with closing(found):  # also where attention raises: what is under way then must not meet the next call
        for keys in found:
            for row, total in zip(rows, totals, strict=True):
                for part in parts(row, keys, layout):
                    join(*total, *dispatch.forward(part))
    for row, total in zip(rows, totals, strict=True):
        add_sinks(call, row, *total)
    return o.to(call.q.dtype), lse


def parts(row: Rows, keys: Keys, layout: Layout) -> Iterator[Problem]:
    """The Problems of a rank's rows with keys that some of them see by their positions."""
    for piece in keys.pieces:
        if sees(row.piece, piece, layout.band):
            yield columns(row.problem, keys.k[:, :, piece.local], keys.v[:, :, piece.local], piece.start)


def passing(links: Links, call: Call, layout: Layout) -> Generator[Keys, None, None]:
    """The rank's own keys, then those that pass by on the ring."""
    for block in around(links, call, layout):
        if block.way is None:
            yield Keys(layout.keys[links.rank], call.k, call.v)
        elif block.source is not None and layout.needs[links.rank][block.source]:
            yield unpack(block.flat, call, layout, block.source)


def around(links: Links, call: Call, layout: Layout) -> Generator[Block, None, None]:
    """The ring's blocks; the rank's own one says nothing but that it is, where nobody else needs it."""
    own = pack(call.k, call.v) if layout.ways else call.k.new_empty(0)
    return ring_pass(links, layout.ways, own, numbers(call, layout))


def fetched(links: Links, call: Call, layout: Layout) -> Generator[Keys, None, None]:
    """All keys that the rank's queries see, consecutive ones side by side."""
    found = fetch(links, call, layout)
    for run in runs(layout, links.rank):
        k = torch.cat([found[source].k[:, :, piece.local] for source, piece in run], 2)
        v = torch.cat([found[source].v[:, :, piece.local] for source, piece in run], 2)
        yield Keys([Piece(run[0][1].start, slice(0, k.shape[2]))], k, v)


def fetch(links: Links, call: Call, layout: Layout) -> dict[int, Keys]:
    """The keys that the rank's queries see, of each rank that has some."""
    flat, sizes, rank = pack(call.k, call.v), numbers(call, layout), links.rank
    sources = [source for source, needed in enumerate(layout.needs[rank]) if needed]
    buffers = [flat.new_empty(sizes[source]) for source in sources]
    receives = list(zip(sources, buffers, strict=True))
    links.exchange([(peer, flat) for peer in range(links.world_size) if layout.needs[peer][rank]], receives)
    return {source: unpack(x, call, layout, source) for source, x in receives}


def runs(layout: Layout, rank: int) -> list[list[tuple[int, Piece]]]:
    """The pieces that a rank's queries see, each with the rank that has it, by position; consecutive ones together."""
    needed = [source for source, needed in enumerate(layout.needs[rank]) if needed]
    ordered = sorted((piece.start, source, piece) for source in needed for piece in layout.keys[source])
    found: list[list[tuple[int, Piece]]] = []
    for start, source, piece in ordered:
        if found and found[-1][-1][1].stop == start:
            found[-1].append((source, piece))
        else:
            found.append([(source, piece)])
    return found


def add_sinks(call: Call, row: Rows, o: Tensor, lse: Tensor) -> None:
    """The sinks join the sum of a rank's rows, in place."""
    if "sinks" in call.tensors:
        sinks = call.tensors["sinks"].to(lse.dtype)[:, None].expand(lse.shape)
        owned = owners(row.problem)[0]
        join(o, lse, torch.zeros_like(o), sinks if owned is None else sinks.where(owned, float("-inf")))


def owners(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Of packed sequences bool [seqlen_q], whether a row is of some sequence, and whether that one is sound."""
    starts, bad = problem.mods.starts_q, problem.mods.bad
    if bad is None:
        return None, None
    rows = torch.arange(problem.q.shape[2], dtype=starts.dtype, device=starts.device)
    owner = torch.searchsorted(starts, rows, right=True) - 1
    owned = (owner >= 0) & (owner < len(bad))
    return owned, owned & ~bad[owner.clamp(0, len(bad) - 1)]


# backward


def backward(
    method: str, links: Links, call: Call, layout: Layout, output: Output, needs: Gradients
) -> list[Tensor | None]:
    """The wanted gradients of q, k, v, bias, slopes and sinks, each of its operand's shape and dtype.

    Those of bias, slopes and sinks are this rank's share: the sum over the ranks is the gradient.
    """
    dtype, names = accumulator_dtype(call.q), ("bias", "alibi_slopes", "sinks")
    operands = [call.q, call.k, call.v, *(call.tensors.get(name) for name in names)]
    sums: list[Tensor | None] = [
        None if x is None or not need else torch.zeros_like(x, dtype=dtype)
        for x, need in zip(operands, needs, strict=True)
    ]
    home = Keys(layout.keys[links.rank], *(call.k.new_empty(0) if x is None else x for x in sums[1:3]))
    rows = rows_of(links, call, layout)
    outputs = [cut(output, row.piece) for row in rows]
    asked = Gradients(*needs[:5], False)

    def differentiate(keys: Keys, grads: Keys) -> None:
        """Add the gradients of the rank's rows with some keys, those of the keys to `grads`."""
        for row, own in zip(rows, outputs, strict=True):
            seen = [piece for piece in keys.pieces if sees(row.piece, piece, layout.band)]
            for piece, part in zip(seen, parts(row, keys, layout), strict=True):
                found = dispatch.backward(part, own.do, own.dlse, own.o, own.lse, asked)
                places = row.piece.local, piece.local, piece.local
                totals = (sums[0], grads.k if needs.k else None, grads.v if needs.v else None)
                for total, gradient, place in zip(totals, found[:3], places, strict=True):
                    if total is not None:
                        total[:, :, place] += gradient
                if sums[3] is not None:
                    bias = sums[3]
                    at = row.piece.local if bias.shape[2] > 1 else slice(None)
                    bias[:, :, at, slice(piece.start, piece.stop) if bias.shape[3] > 1 else slice(None)] += found.bias
                if sums[4] is not None:
                    sums[4].add_(found.alibi_slopes.view_as(sums[4]))

    if any(asked):
        way = backward_on_the_ring if method == "ring" else backward_of_fetched
        way(links, call, layout, home, needs, differentiate)
    if sums[5] is not None:
        for row, own in zip(rows, outputs, strict=True):
            subtract_sinks(call, row, own, sums[5])
    return [None if total is None or x is None else total.to(x.dtype) for x, total in zip(operands, sums, strict=True)]


def cut(output: Output, piece: Piece) -> Output:
    """The rows of a piece; kernels take lse dense."""
    o, lse, do, dlse = (None if x is None else x[:, :, piece.local] for x in output)
    assert o is not None and lse is not None and do is not None
    return Output(o, lse.contiguous(), do, dlse)


def backward_on_the_ring(
    links: Links, call: Call, layout: Layout, home: Keys, needs: Gradients, differentiate: Callable[[Keys, Keys], None]
) -> None:
    """Add the gradients of the rank's own keys to `home`: while keys pass by, theirs travel a step behind them."""
    sizes, rank, dtype = numbers(call, layout), links.rank, accumulator_dtype(call.k)

    def zeros(source: int) -> Tensor:
        return call.k.new_zeros(sizes[source], dtype=dtype)

    carried, post = None, Post([], [])
    returned: list[Tensor] = []
    with closing(around(links, call, layout)) as blocks:
        for block in blocks:
            source, share = block.source, None
            if block.way is None:
                differentiate(Keys(layout.keys[rank], call.k, call.v), home)
                continue
            if source is not None:
                share = zeros(source)
                if layout.needs[rank][source]:
                    differentiate(unpack(block.flat, call, layout, source), unpack(share, call, layout, source))
            if needs.k or needs.v:
                post.wait()
                add(home, returned, call, layout, rank, needs)
                if share is not None and carried is not None:
                    share += carried
                post, carried, returned = hand_on(links, block, share, zeros)
    post.wait()
    add(home, returned, call, layout, rank, needs)


def add(home: Keys, arrived: Sequence[Tensor], call: Call, layout: Layout, rank: int, needs: Gradients) -> None:
    """Add gradients of the rank's own keys that came from others, in their order."""
    for flat in arrived:
        keys = unpack(flat, call, layout, rank)
        for total, x, need in ((home.k, keys.k, needs.k), (home.v, keys.v, needs.v)):
            if need:
                total += x


def hand_on(
    links: Links, block: Block, share: Tensor | None, zeros: Callable[[int], Tensor]
) -> tuple[Post, Tensor | None, list[Tensor]]:
    """Send the gradients of the keys that are here after them, or home; receive those that are next, and own ones.

    Returns:
        the messages, the gradients that keys of the next hop have so far (None: no keys come), and those of the rank's
        own keys where they come home now.
    """
    way, hop, rank = block.way, block.hop, links.rank
    assert way is not None
    sends = []
    if block.source is not None and share is not None:
        onwards = way.reach[block.source] > hop
        sends.append((way.neighbour(rank, 1) if onwards else block.source, share))
    following = way.source(rank, hop + 1)
    carried = None if following is None else zeros(following)
    receives = [] if carried is None else [(way.neighbour(rank, -1), carried)]
    arrived = [zeros(rank)] if way.reach[rank] == hop else []
    receives += [(way.neighbour(rank, hop), x) for x in arrived]
    return links.post(sends, receives), carried, arrived


def backward_of_fetched(
    links: Links, call: Call, layout: Layout, home: Keys, needs: Gradients, differentiate: Callable[[Keys, Keys], None]
) -> None:
    """Add the gradients of the rank's own keys to `home`: each rank sends every other its share."""
    sizes, rank, dtype = numbers(call, layout), links.rank, accumulator_dtype(call.k)
    sources = [source for source, needed in enumerate(layout.needs[rank]) if needed]
    flats = {source: call.k.new_zeros(sizes[source], dtype=dtype) for source in sources}
    shares = {source: unpack(flat, call, layout, source) for source, flat in flats.items()}
    for run, keys in zip(runs(layout, rank), fetched(links, call, layout), strict=True):
        grads = Keys(keys.pieces, *(torch.zeros_like(x, dtype=dtype) for x in (keys.k, keys.v)))
        differentiate(keys, grads)
        at = 0
        for source, piece in run:
            end = at + piece.stop - piece.start
            for total, x in ((shares[source].k, grads.k), (shares[source].v, grads.v)):
                total[:, :, piece.local] = x[:, :, at:end]
            at = end
    if needs.k or needs.v:
        peers = [peer for peer in range(links.world_size) if layout.needs[peer][rank]]
        arrived = [(peer, call.k.new_empty(sizes[rank], dtype=dtype)) for peer in peers]
        links.exchange(list(flats.items()), arrived)
        add(home, [x for _, x in arrived], call, layout, rank, needs)


def subtract_sinks(call: Call, row: Rows, own: Output, total: Tensor) -> None:
    """Add -sum_bi exp(sink - lse) (do . o - dlse) over a rank's rows to the gradient of the sinks."""
    lse = own.lse
    delta = (own.do.to(lse.dtype) * own.o.to(lse.dtype)).sum(-1)
    if own.dlse is not None:
        delta -= own.dlse
    nobody = lse == float("-inf")
    sound = owners(row.problem)[1]
    if sound is not None:
        nobody = nobody | ~sound
    weights = (call.tensors["sinks"].to(lse.dtype)[:, None] - lse).exp()
    total -= (weights * delta).masked_fill(nobody, 0.0).sum((0, 2))
