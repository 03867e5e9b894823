"""How the torch backend walks over the scores: some query rows against the keys that any of them may see.

A tile holds whole rows, so that its softmax needs no running maximum, and few enough of them that the scores stay
within `TILE_BYTES` at every length. Keys that no row of it can see, by position (causal, window), by `Mods.spans` or by
`Mods.blocks`, are left out; a tile without keys never comes up. A packed sequence is a `Call` of its own, on views.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.kernels.spec import Mods, Positions, Spans, Spec, accumulator_dtype

TILE_BYTES = 8 * 2**20  # of one temporary; a handful of this size is all the memory beside the results
NARROW_ROWS = 128  # of a tile where rows far apart see other keys: more rows share a load, fewer visit less in vain
NARROW_BYTES = 2 * 2**20  # of a temporary there and in fused calls: wider ones take more heads at a time, not rows
FARTHEST = 2**40  # no offset is larger, so that positions fit int64


class Origin(NamedTuple):
    """Where a packed sequence lies: its number, its first row and key; zeros for a call that is not packed."""

    b: int = 0
    row: int = 0
    col: int = 0


class Call(NamedTuple):
    """The operands of a call, or of one packed sequence of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mods: Mods
    spec: Spec
    scale: float
    positions: Positions
    origin: Origin = Origin()


class Tile(NamedTuple):
    """Query rows of some heads of one sequence, and the keys that any of the rows may see."""

    b: int
    heads_k: slice
    heads: slice  # the query heads that share heads_k
    rows: slice
    cols: Any  # a slice, or int64 [cols] where blocks leave gaps
    key_blocks: Tensor | None  # int64, those that cols came from
    first: int  # position of the first row among the keys

    @property
    def shape(self) -> tuple[int, int, int]:
        """(query heads, rows, keys)."""
        cols = self.cols.stop - self.cols.start if isinstance(self.cols, slice) else len(self.cols)
        return len(range(*self.heads.indices(self.heads.stop))), self.rows.stop - self.rows.start, cols

    def keys(self, device: torch.device) -> Tensor:
        """int64 [cols]: the keys' indices."""
        if isinstance(self.cols, slice):
            return torch.arange(self.cols.start, self.cols.stop, device=device)
        return self.cols  # type: ignore[no-any-return]

    def queries(self, device: torch.device) -> Tensor:
        """int64 [rows, 1]: the queries' indices."""
        return torch.arange(self.rows.start, self.rows.stop, device=device).unsqueeze(1)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [rows, 1]: the queries' positions among the keys."""
        return torch.arange(self.first, self.first + self.shape[1], device=device).unsqueeze(1)


def tiles(call: Call, fits: int, together: int | None = None) -> Iterator[Tile]:
    """The tiles of a call, without those no query of which can see a key.

    Args:
        call: the call.
        fits: how many pairs of a row and a key a tile may have.
        together: key heads in a tile, whose pairs count once; None: as many as fit, each with pairs of its own.
    """
    q, k = call.q, call.k
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    if 0 in (batch, heads, seqlen_q, seqlen_k):
        return
    group = heads // heads_k
    block_m = min(seqlen_q, NARROW_ROWS if is_narrow(call) else max(1, fits // seqlen_k))
    for b, offset in enumerate(offsets_of(call)):
        start = 0
        while start < seqlen_q:
            stop = min(start + block_m, seqlen_q)
            width = width_of(call, b, slice(start, stop), offset)
            if (stop - start) * width > fits:
                stop = start + max(1, fits // width)
            rows = slice(start, stop)
            start = stop
            cols, key_blocks = keys_of(call, b, rows, offset)
            tile = Tile(b, slice(0, heads_k), slice(0, heads), rows, cols, key_blocks, rows.start + offset)
            _, found, width = tile.shape
            if width <= 0:
                continue
            step = max(1, fits // (found * width)) if together is None else together
            for h in range(0, heads_k, step):
                last = min(h + step, heads_k)
                yield tile._replace(heads_k=slice(h, last), heads=slice(h * group, last * group))


def is_narrow(call: Call) -> bool:
    """Whether rows far apart may see other keys."""
    return call.spec.left or call.spec.blocks is not None or call.mods.spans is not None


def offsets_of(call: Call) -> list[int]:
    """The position of query 0 of each sequence."""
    batch = call.q.shape[0]
    found = [call.positions.q_offset] * batch if call.mods.q_offset is None else call.mods.q_offset.tolist()
    return [min(max(offset, -FARTHEST), FARTHEST) for offset in found]


def range_of(call: Call, b: int, rows: slice, offset: int) -> tuple[int, int]:
    """The first key that some row may see, and one past the last, by positions and spans; equal ones where none."""
    spec, positions, spans = call.spec, call.positions, call.mods.spans
    begin, end = 0, call.k.shape[2]
    if spec.causal:
        end = min(end, rows.stop + offset)
    if spec.right:
        end = min(end, rows.stop + offset + positions.right)
    if spec.left:
        begin = max(begin, rows.start + offset - positions.left)
    if spans is not None:
        if spans.key_begin is not None:
            begin = max(begin, int(part_of(spans.key_begin, b, rows).min()))
        if spans.key_end is not None:
            end = min(end, int(part_of(spans.key_end, b, rows).max()))
    return begin, max(begin, end)


def part_of(bound: Tensor, b: int, rows: slice) -> Tensor:
    """The rows' part of a bound [batch or 1, heads or 1, seqlen or 1]."""
    return bound[b if bound.shape[0] > 1 else 0, :, rows if bound.shape[2] > 1 else slice(None)]


def width_of(call: Call, b: int, rows: slice, offset: int) -> int:
    """How many keys a tile has, blocks not counted."""
    begin, end = range_of(call, b, rows, offset)
    return end - begin


def keys_of(call: Call, b: int, rows: slice, offset: int) -> tuple[Any, Tensor | None]:
    """The keys that some row may see: a slice and None, or where blocks leave gaps their indices and the key blocks."""
    begin, end = range_of(call, b, rows, offset)
    if call.spec.blocks is None or begin == end:
        return slice(begin, end), None
    size_q, size_k = call.spec.blocks
    state, _, row, col = part_of_blocks(call, b)
    seen = state[:, (rows.start + row) // size_q : (rows.stop - 1 + row) // size_q + 1] != -1
    first, last = (begin + col) // size_k, (end - 1 + col) // size_k
    key_blocks = seen[..., first : last + 1].flatten(0, 1).any(0).nonzero().squeeze(1) + first
    keys = (key_blocks.unsqueeze(1) * size_k + torch.arange(size_k, device=state.device)).flatten() - col
    keys = keys[(keys >= begin) & (keys < end)]
    if not len(keys):
        return slice(begin, begin), None
    begin, end = int(keys[0]), int(keys[-1]) + 1
    return (slice(begin, end) if end - begin == len(keys) else keys), key_blocks


def part_of_blocks(call: Call, b: int) -> tuple[Tensor, int, int, int]:
    """The state of one sequence's blocks, [heads or 1, query blocks, key blocks], and the head, row and key of them
    that its own first ones are."""
    assert call.mods.blocks is not None
    state: Tensor = call.mods.blocks.state
    first, head, row, col = origin_of(call, b)
    return state[b + first if state.shape[0] > 1 else 0], head, call.origin.row + row, call.origin.col + col


def origin_of(call: Call, b: int) -> tuple[int, int, int, int]:
    """The batch element, head, query and key of the whole call that this one begins at in batch element b."""
    origin = call.mods.origin
    if origin is None:
        return 0, 0, 0, 0
    return tuple(origin[b if origin.shape[0] > 1 else 0].tolist())


def sequences(call: Call) -> Iterator[tuple[Call, slice, slice, bool]]:
    """Each packed sequence as a call of its own, its rows, its keys, and whether its lengths were hostile."""
    mods = call.mods
    starts_q, starts_k, bad = mods.starts_q.tolist(), mods.starts_k.tolist(), mods.bad.tolist()
    for b in range(len(bad)):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        own = mods if bad[b] else own_mods(mods, b, rows.stop - rows.start, keys.stop - keys.start)
        q, k, v = call.q[:, :, rows], call.k[:, :, keys], call.v[:, :, keys]
        yield call._replace(q=q, k=k, v=v, mods=own, origin=Origin(b, rows.start, keys.start)), rows, keys, bad[b]


def own_mods(mods: Mods, b: int, seqlen_q: int, seqlen_k: int) -> Mods:
    """The operands of packed sequence b as those of a call with a batch of one."""
    spans = mods.spans
    if spans is not None:
        lengths = (seqlen_q, seqlen_q, seqlen_k, seqlen_k)
        spans = Spans(*(cut(bound, b, None, length) for bound, length in zip(spans, lengths, strict=True)))
    return mods._replace(
        q_offset=cut(mods.q_offset, b),
        mask=cut(mods.mask, b, None, seqlen_q, seqlen_k),
        bias=cut(mods.bias, b, None, seqlen_q, seqlen_k),
        alibi_slopes=cut(mods.alibi_slopes, b, None),
        starts_q=None,
        starts_k=None,
        bad=None,
        origin=cut(mods.origin, b),
        spans=spans,
    )


def cut(x: Any, b: int, *lengths: int | None) -> Any:
    """Sequence b's part of an operand [batch, ...] whose axes may be 1, a view; its batch axis stays, of size 1."""
    if x is None:
        return None
    x = x[b : b + 1] if x.shape[0] > 1 else x
    for axis, length in enumerate(lengths, 1):
        if length is not None and x.shape[axis] > 1:
            x = x.narrow(axis, 0, length)
    return x


def operand(x: Tensor, tile: Tile) -> Tensor:
    """The tile's part of an operand whose four axes may each be 1: [heads, rows, cols], or 1 there."""
    b, heads, rows, cols = places(x, tile)
    part = x[b, heads, rows]
    return part[..., cols]


def places(x: Tensor, tile: Tile) -> tuple[int, slice, slice, Any]:
    """Where the tile's part of a broadcastable operand is."""
    whole = slice(None)
    return (
        tile.b if x.shape[0] > 1 else 0,
        tile.heads if x.shape[1] > 1 else whole,
        tile.rows if x.shape[2] > 1 else whole,
        tile.cols if x.shape[3] > 1 else whole,
    )


def load_rows(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """x [batch, heads, seqlen_q, d] -> [heads_k, group * rows, d]; copied, a tile's worth, where strides need it."""
    rows = x[tile.b, tile.heads, tile.rows].to(dtype)
    return rows.reshape(tile.heads_k.stop - tile.heads_k.start, -1, x.shape[-1])


def load_keys(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """x [batch, heads_k, seqlen_k, d] -> [heads_k, cols, d]."""
    return x[tile.b, tile.heads_k][:, tile.cols].to(dtype)


def store_rows(x: Tensor, tile: Tile, value: Tensor) -> None:
    """value [heads_k, group * rows, d] into x [batch, heads, seqlen_q, d]."""
    x[tile.b, tile.heads, tile.rows] = value.reshape(tile.heads.stop - tile.heads.start, -1, x.shape[-1]).to(x.dtype)


def add_keys(x: Tensor, tile: Tile, value: Tensor) -> None:
    """value [heads_k, cols, d] onto x [batch, heads_k, seqlen_k, d]; no key comes twice, so the order is fixed."""
    x[tile.b, tile.heads_k][:, tile.cols] += value


def add_operand(x: Tensor, tile: Tile, value: Tensor) -> None:
    """value [heads, rows, cols] onto the tile's part of a broadcastable x, summed over the axes where x is 1."""
    axes = [axis for axis in range(3) if x.shape[axis + 1] == 1 and value.shape[axis] > 1]
    b, heads, rows, cols = places(x, tile)
    x[b, heads, rows][..., cols] += value.sum(axes, keepdim=True) if axes else value


def pairs_of_a_tile(call: Call) -> int:
    """Rows times keys of a key head that a tile holds the scores of."""
    group = call.q.shape[1] // max(1, call.k.shape[1])
    size = NARROW_BYTES if is_narrow(call) else TILE_BYTES
    return max(1, size // (accumulator_dtype(call.q).itemsize * max(1, group)))


def accumulator_of(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Zeros to sum a gradient in: itself where its dtype will do."""
    if grad is None or grad.dtype == dtype:
        return None if grad is None else grad.zero_()
    return torch.zeros_like(grad, dtype=dtype)
