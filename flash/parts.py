"""A part of a Problem: its rows against some of its keys, which count as they did in the whole.

Where q, k and v lie in pieces, a piece of q meets a piece of the keys in a Problem of their own. By position nothing
changes (q_offset moves), operands with an axis of keys are narrowed, and whoever reads raw indices, as user functions
and dropout do, is told by `Mods.origin` where the part begins. (o, lse) of the parts merge to those of the whole
(`flash.merge`); the gradients of the parts, each given the whole's o and lse, add up.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from .checks import MAX_SEQLEN
from .kernels.spec import Mods, Spans
from .problem import Problem, positions_of
from .twins import MaskMod, ScoreMod, changed

M = TypeVar("M", ScoreMod, MaskMod)


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
        NotImplementedError: band has a block mask, or packed sequences and a mask or bias with an axis of keys.
    """
    mods, spec, n = band.mods, band.spec._replace(part=True), k.shape[2]
    if mods.blocks is not None:
        raise NotImplementedError("a block mask is not cut by keys; pass its rule as mask_mod")
    begin: int | torch.Tensor = col  # of packed sequences [batch], in each of them
    positions, q_offset, starts_k = band.positions, mods.q_offset, mods.starts_k
    if starts_k is not None:
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
    return moved(replace(band, k=k, v=v, mods=mods, spec=spec, positions=positions), 0, 0, begin)


def starting(problem: Problem, head: int = 0, row: int | torch.Tensor = 0) -> Problem:
    """A Problem that begins at a head and a row of the whole, for whoever in it reads raw indices.

    Args:
        problem: some heads and rows of the whole.
        head: the first of its query heads.
        row: the first of its rows; of packed sequences [batch], any integer dtype, in each of them.

    Returns:
        The Problem, its operands as they were but for Mods.origin.
    """
    return moved(problem, head, row, 0)


def rows_of_mod(mod: M | None, row: int, seqlen_q: int) -> M | None:
    """A user function of a call as that of its rows from `row` on, whose indices `starting` moves.

    Args:
        mod: the function for all rows, or None.
        row: the first of the rows.
        seqlen_q: how many rows the whole has, or of packed sequences the longest.

    Returns:
        A copy with the same functions and args, whose check and spans are asked about the whole; or None.
    """
    if mod is None:
        return None
    check = mod.check
    fields: dict[str, Any] = {"check": None if check is None else check_of_rows(check, seqlen_q)}
    if isinstance(mod, MaskMod) and mod.spans is not None:
        fields["spans"] = spans_of_rows(mod.spans, row, seqlen_q)
    return changed(mod, **fields)  # type: ignore[no-any-return]


def check_of_rows(check: Callable[..., None], whole: int) -> Callable[..., None]:
    """A mod's check, asked about all rows."""
    return lambda batch, heads, seqlen_q, seqlen_k, args: check(batch, heads, whole, seqlen_k, args)


def spans_of_rows(spans: Callable[..., Spans], row: int, whole: int) -> Callable[..., Spans]:
    """A MaskMod's spans for rows from `row` on, cut out of those for all rows."""

    def found(seqlen_q: int, seqlen_k: int, args: Sequence[torch.Tensor]) -> Spans:
        key_begin, key_end, query_begin, query_end = spans(whole, seqlen_k, args)
        own = narrowed(key_begin, 2, row, seqlen_q), narrowed(key_end, 2, row, seqlen_q)
        return Spans(*own, *shifted(query_begin, query_end, row, seqlen_q))

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


def moved(problem: Problem, head: int, row: int | torch.Tensor, col: int | torch.Tensor) -> Problem:
    """A Problem whose origin lies so much further on; where nobody reads it there is none."""
    mods, start = problem.mods, (head, row, col)
    numbered = problem.spec.dropout_p > 0 or mods.score_mod is not None or mods.mask_mod is not None
    if not numbered or all(isinstance(x, int) and x == 0 for x in start):
        return problem
    return replace(problem, mods=mods._replace(origin=origin_of(mods, start, problem.q.device)))


def origin_of(mods: Mods, start: Sequence[int | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Mods.origin moved on by (head, row, col), int32 [1 or batch, 3]."""
    batch = max([1, *(len(x) for x in start if isinstance(x, torch.Tensor))])
    origin = torch.zeros(batch, 3, dtype=torch.int32, device=device)
    for axis, first in enumerate(start):
        origin[:, axis] = first
    return origin if mods.origin is None else mods.origin + origin
