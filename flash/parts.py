"""A part of a Problem: its rows against some of its keys, which count as they did in the whole.

Where q, k and v lie in pieces, a piece of q meets a piece of the keys in a Problem of their own. By position nothing
changes (q_offset moves), operands with an axis of keys are narrowed, and whoever reads raw indices, as user functions
and dropout do, is told by `Mods.origin` where the part begins. (o, lse) of the parts merge to those of the whole
(`flash.merge`); the gradients of the parts, each given the whole's o and lse, add up.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from .checks import MAX_SEQLEN
from .kernels.spec import Blocks, Mods, Spans
from .problem import Problem, positions_of
from .twins import MaskMod, ScoreMod, changed

M = TypeVar("M", bound=ScoreMod | MaskMod)


class Extent(NamedTuple):
    """Which indices of one axis of a whole a call has."""

    start: int
    size: int
    whole: int


class Extents(NamedTuple):
    """Which batch elements, query heads and rows of a whole a call has."""

    batch: Extent
    heads: Extent
    rows: Extent


def columns(band: Problem, k: torch.Tensor, v: torch.Tensor, col: int) -> Problem:
    """The part of a Problem that has keys col ... col + n - 1 only; nothing waits for the device.

    The sink is left out: it joins the merged result once.

    Args:
        band: rows against all keys, whose k and v are read for their shapes alone.
        k: [batch, heads_k, n, head_dim], or those of packed sequences [1, heads_k, n, head_dim]; n may be 0.
        v: [batch, heads_k, n, head_dim_v].
        col: the first of the keys among all of them, packed ones included.

    Returns:
        The part, of views of band's operands.

    Raises:
        NotImplementedError: sequences are packed, and there is a block mask, or a mask or bias with an axis of keys.
    """
    mods, spec, n = band.mods, band.spec._replace(part=True), k.shape[2]
    begin: int | torch.Tensor = col  # of packed sequences [batch], in each of them
    positions, q_offset, starts_k = band.positions, mods.q_offset, mods.starts_k
    if starts_k is not None:
        if mods.blocks is not None:
            raise NotImplementedError("block_mask of packed sequences is not cut by keys; pass its rule as mask_mod")
        for name, x in (("mask", mods.mask), ("bias", mods.bias)):
            if x is not None and x.shape[3] > 1:
                hint = "pass mask_mod or score_mod"
                raise NotImplementedError(f"{name} of packed sequences, each cut elsewhere, is not cut by keys; {hint}")
        begin = (col - starts_k[:-1]).clamp(min=0)  # no matter of a sequence that has ended
        starts_k = (starts_k - col).clamp(0, n)
    if q_offset is not None:
        q_offset = q_offset.clamp(-MAX_SEQLEN, MAX_SEQLEN) - begin
    else:
        left, right = (
            reach if there else None for reach, there in zip(positions[1:], (spec.left, spec.right), strict=True)
        )
        positions = positions_of(positions.q_offset - col, left, right)
    mods = mods._replace(
        q_offset=q_offset,
        mask=narrowed(mods.mask, 3, col, n),
        bias=narrowed(mods.bias, 3, col, n),
        sinks=None,
        starts_k=starts_k,
        spans=None if mods.spans is None else spans_of_columns(mods.spans, col, n),
    )
    return moved(replace(band, k=k, v=v, mods=mods, spec=spec, positions=positions), (0, 0, 0, begin))


def starting(problem: Problem, batch: int = 0, head: int = 0, row: int | torch.Tensor = 0) -> Problem:
    """A Problem that begins somewhere in the whole, for whoever in it reads raw indices.

    Args:
        problem: some batch elements, heads and rows of the whole.
        batch: the first of its batch elements.
        head: the first of its query heads.
        row: the first of its rows; of packed sequences [batch], any integer dtype, in each of them.

    Returns:
        The Problem, its operands as they were but for Mods.origin.
    """
    return moved(problem, (batch, head, row, 0))


def within_blocks(problem: Problem, blocks: Blocks, sizes: tuple[int, int]) -> Problem:
    """A dense Problem whose pairs a block mask of the whole hides; `starting` says where in the mask it begins.

    Its tiles are not listed: each pair is looked up.

    Args:
        problem: without a block mask.
        blocks: those of the whole, as `flash.blocks.blocks_of` makes them.
        sizes: queries and keys in a block.
    """
    mods, spec = problem.mods._replace(blocks=blocks), problem.spec._replace(blocks=sizes, hides=True)
    origin = origin_of(mods, (0, 0, 0, 0), problem.q.device)  # there even where it is 0: lists are of the whole
    return replace(problem, mods=mods._replace(origin=origin), spec=spec)


def mod_of_part(mod: M | None, extents: Extents) -> M | None:
    """A user function of a whole as that of a part of it, whose indices `starting` moves.

    Args:
        mod: the function, or None.
        extents: what the part has of the whole; of packed sequences rows are those of the longest.

    Returns:
        A copy with the same functions and args, whose check and spans are asked about the whole; or None.
    """
    if mod is None:
        return None
    check = mod.check
    fields: dict[str, Any] = {"check": None if check is None else check_of_whole(check, extents)}
    if isinstance(mod, MaskMod) and mod.spans is not None:
        fields["spans"] = spans_of_part(mod.spans, extents)
    return changed(mod, **fields)  # type: ignore[no-any-return]


def check_of_whole(check: Callable[..., None], extents: Extents) -> Callable[..., None]:
    """A mod's check, asked about the whole."""
    whole = [own.whole for own in extents]
    return lambda batch, heads, seqlen_q, seqlen_k, args: check(*whole, seqlen_k, args)


def spans_of_part(spans: Callable[..., Spans], extents: Extents) -> Callable[..., Spans]:
    """A MaskMod's spans for a part, cut out of those for the whole."""
    batch, heads, rows = extents

    def found(seqlen_q: int, seqlen_k: int, args: Sequence[torch.Tensor]) -> Spans:
        bounds = [narrowed(narrowed(x, 0, *batch[:2]), 1, *heads[:2]) for x in spans(rows.whole, seqlen_k, args)]
        key_begin, key_end, query_begin, query_end = bounds
        own = narrowed(key_begin, 2, *rows[:2]), narrowed(key_end, 2, *rows[:2])
        return Spans(*own, *shifted(query_begin, query_end, *rows[:2]))

    return found


def spans_of_columns(spans: Spans, col: int, n: int) -> Spans:
    """The Spans of n keys from col on."""
    keys = shifted(spans.key_begin, spans.key_end, col, n)
    return Spans(*keys, narrowed(spans.query_begin, 2, col, n), narrowed(spans.query_end, 2, col, n))


def shifted(begin: torch.Tensor, end: torch.Tensor, first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds among all indices as bounds among n of them from `first` on; those of nothing are n and 0."""
    begin, end = (x.clamp(first, first + n) - first for x in (begin, end))
    nothing = begin >= end
    return torch.where(nothing, n, begin), torch.where(nothing, 0, end)


def narrowed(x: Any, axis: int, first: int, n: int) -> Any:
    """n indices of an operand's axis from `first` on, a view; None, or all of an axis of 1, stay."""
    return x if x is None or x.shape[axis] == 1 else x.narrow(axis, first, n)


def moved(problem: Problem, start: Sequence[int | torch.Tensor]) -> Problem:
    """A Problem whose origin (batch, head, row, key) lies so much further on; where nobody reads it there is none."""
    mods = problem.mods
    numbered = problem.spec.dropout_p > 0 or any(x is not None for x in (mods.score_mod, mods.mask_mod, mods.blocks))
    if not numbered or all(isinstance(x, int) and x == 0 for x in start):
        return problem
    return replace(problem, mods=mods._replace(origin=origin_of(mods, start, problem.q.device)))


def origin_of(mods: Mods, start: Sequence[int | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Mods.origin moved on, int32 [1 or batch, 4]."""
    batch = max([1, *(len(x) for x in start if isinstance(x, torch.Tensor))])
    origin = torch.zeros(batch, 4, dtype=torch.int32, device=device)
    for axis, first in enumerate(start):
        origin[:, axis] = first
    return origin if mods.origin is None else mods.origin + origin
