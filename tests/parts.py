"""A call as the sum of its parts, each a Problem of some rows and some keys (flash/parts.py)."""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from flash import dispatch
from flash.kernels.spec import Config, Gradients, accumulator_dtype
from flash.merge import merge
from flash.parts import Extent, Extents, columns, mod_of_part, starting, within_blocks
from flash.problem import Problem
from tests.bounds import Inputs, Outputs
from tests.features import seed_of

TILES = {"forward": Config(16, 16, 4, 1), "dkdv": Config(16, 16, 4, 1), "dq": Config(16, 16, 4, 1)}
Piece = tuple[int, int]  # the first, and how many


class Pieces(NamedTuple):
    """Where a call is cut."""

    rows: list[Piece]
    cols: list[Piece]
    heads_k: list[Piece] | None = None  # one of all
    batch: list[Piece] | None = None  # likewise


def within(x: torch.Tensor | None, axis: int, piece: Piece) -> Any:
    """A piece of an operand's axis, which may be 1."""
    return x if x is None or x.shape[axis] == 1 else x.narrow(axis, *piece)


def whole_of(x: Inputs, backend: str, config: Any = TILES) -> Problem:
    """The whole call, its dropout's seed the one that `features` draws."""
    problem = Problem.of(x.q, x.k, x.v, **x.options, backend=backend, config=None if backend == "torch" else config)
    if problem.spec.dropout_p == 0:
        return problem
    return replace(problem, mods=problem.mods._replace(seed=torch.tensor([seed_of(x)], device=x.q.device)))


def band_of(whole: Problem, x: Inputs, rows: Piece, heads_k: Piece, batch: Piece | None = None) -> Problem:
    """Some rows, heads and batch elements of the whole call against all keys, which it does not hold."""
    group = whole.q.shape[1] // whole.k.shape[1]
    heads = heads_k[0] * group, heads_k[1] * group
    options = dict(x.options)
    block_mask = options.pop("block_mask", None)
    batch = batch or (0, len(whole.q))
    own_batch = 1 if "cu_seqlens_q" in options else batch[1]
    stand_ins = [t.new_empty(()).expand(own_batch, heads_k[1], *t.shape[2:]) for t in (whole.k, whole.v)]
    packed = "cu_seqlens_q" in options
    row: Any = rows[0]
    offset: Any = whole.positions.q_offset
    if packed:
        starts = whole.mods.starts_q
        row = torch.minimum((rows[0] - starts[:-1]).clamp(min=0), starts.diff())
        options |= {"cu_seqlens_q": (starts - rows[0]).clamp(0, rows[1]), "cu_seqlens_k": whole.mods.starts_k}
    offset = offset + row if whole.mods.q_offset is None else whole.mods.q_offset + row
    if isinstance(offset, torch.Tensor) and not packed:
        offset = offset[batch[0] : sum(batch)]
    for name in ("mask", "bias"):
        if name in options:
            options[name] = within(within(within(options[name], 2, rows), 1, heads), 0, batch)
    if options.get("alibi_slopes") is not None and options["alibi_slopes"].dim() == 2 and not packed:
        options["alibi_slopes"] = options["alibi_slopes"][batch[0] : sum(batch)]
    for name in ("score_mod", "mask_mod"):
        if name in options and not packed:
            extents = zip((batch, heads, rows), whole.q.shape[:3], strict=True)
            options[name] = mod_of_part(options[name], Extents(*(Extent(*own, size) for own, size in extents)))
    q = whole.q[:, heads[0] : sum(heads), rows[0] : sum(rows)]
    q = q if packed else q[batch[0] : sum(batch)]
    inputs = [t[0].transpose(0, 1) for t in (q, *stand_ins)] if packed else [q, *stand_ins]
    config = {name: x for name, x in zip(TILES, whole.configs, strict=True) if x is not None}
    band = Problem.of(*inputs, **options | {"q_offset": offset, "backend": whole.backend, "config": config})
    band = replace(band, mods=band.mods._replace(seed=whole.mods.seed, bad=whole.mods.bad))
    if block_mask is not None:
        assert whole.mods.blocks is not None and whole.spec.blocks is not None
        band = within_blocks(band, whole.mods.blocks, whole.spec.blocks)
    return starting(band, 0 if packed else batch[0], heads[0], row)


def gradients(problem: Problem, do: Any, dlse: Any, o: Any, lse: Any) -> Gradients:
    """All gradients but those of sinks."""
    given = problem.mods.bias is not None, problem.mods.alibi_slopes is not None
    return dispatch.backward(problem, do, dlse, o, lse, Gradients(True, True, True, *given, False))


def together(whole: Problem, x: Inputs, pieces: Pieces, do: torch.Tensor, dlse: torch.Tensor | None) -> Outputs:
    """Outputs and gradients of the whole call, of nothing but parts of it."""
    group = whole.q.shape[1] // whole.k.shape[1]
    o, lse = (
        torch.zeros_like(do),
        torch.full(do.shape[:3], float("-inf"), dtype=accumulator_dtype(do), device=do.device),
    )
    sums = [None if t is None else torch.zeros_like(t) for t in (whole.q, whole.k, whole.v, *whole.mods[2:4])]
    every = pieces.heads_k or [(0, whole.k.shape[1])], pieces.batch or [(0, len(whole.q))]
    for heads_k, batch in itertools.product(*every):
        heads, these = slice(heads_k[0] * group, sum(heads_k) * group), slice(batch[0], sum(batch))
        for rows in pieces.rows:
            band = band_of(whole, x, rows, heads_k, batch)
            at = (these, heads, slice(rows[0], sum(rows)))
            parts = []
            for col, n in pieces.cols:
                keys = (these, slice(heads_k[0], sum(heads_k)), slice(col, col + n))
                parts.append((columns(band, whole.k[keys], whole.v[keys], col), keys))
            for part, _ in parts:
                o_part, lse_part = dispatch.forward(part)
                o[at], lse[at] = merge(o[at], lse[at], o_part, lse_part)
            if whole.mods.sinks is not None:
                with_sinks = torch.logaddexp(lse[at], whole.mods.sinks[heads, None])
                o[at] *= (lse[at] - with_sinks).exp()[..., None]
                lse[at] = with_sinks
            for part, keys in parts:
                found = gradients(part, do[at], None if dlse is None else dlse[at], o[at], lse[at].contiguous())
                piece = (at[1].start, at[1].stop - at[1].start), rows, (keys[2].start, keys[2].stop - keys[2].start)
                places = [t if t is None else t[where] for t, where in zip(sums[:3], (at, keys, keys), strict=True)]
                bias = within(sums[3], 0, batch)
                for axis, own in enumerate(piece, 1):
                    bias = within(bias, axis, own)
                slopes = sums[4] if sums[4] is None else sums[4][:, heads]
                slopes = slopes if whole.mods.bad is not None else within(slopes, 0, batch)
                for total, term in zip((*places, bias, slopes), found, strict=False):
                    if total is not None:
                        assert term is not None
                        total += term
    return Outputs(o, lse, *sums)
