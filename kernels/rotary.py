"""Rotary position embedding (Su et al. 2021): pairs of a row's dimensions turn by angles that grow with its position p.

    y_a = x_a cos[p, n] - x_b sin[p, n]        pair n is dimensions (a, b) = (n, n + pairs), as in GPT-NeoX,
    y_b = x_a sin[p, n] + x_b cos[p, n]        or (2n, 2n + 1) where interleaved, as in GPT-J

Dimensions past the last pair stay. Positions below 0 turn as 0; past the tables' end the pairs become NaN, as nothing
says where they should turn. Rows turn while they are loaded: no turned copy is in memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .spec import Rotary


class Angles(NamedTuple):
    """The tables of a `Rotary` as a kernel is given them: pointers, and strides of positions and of pairs."""

    cos: Any
    sin: Any
    cos_s: Any
    cos_d: Any
    sin_s: Any
    sin_d: Any
    positions: Any  # how many the tables have


class Turn(NamedTuple):
    """What the compiler must know of a `Rotary`; no pairs: nothing turns."""

    pairs: int = 0
    interleaved: bool = False


def angles_of(rotary: Rotary | None) -> tuple[Angles | None, Turn]:
    """What kernels are given of a `Rotary`."""
    if rotary is None or rotary.cos.shape[1] == 0:
        return None, Turn()
    positions, pairs = rotary.cos.shape
    (cos_s, cos_d), (sin_s, sin_d) = rotary.cos.stride(), rotary.sin.stride()
    return Angles(rotary.cos, rotary.sin, cos_s, cos_d, sin_s, sin_d, positions), Turn(pairs, rotary.interleaved)


@triton.jit
def turned(x, stride_d, p, inside, angles, turn: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows turned by their positions and rounded to their dtype again, 0 past DIM and for rows not inside.

    x: addresses of the rows' first elements [R, 1]; p: int32 positions [R, 1]; inside [R, 1] -> [R, BLOCK_D].
    """
    dims = tl.arange(0, BLOCK_D)
    inside &= (dims < DIM)[None, :]
    own = tl.load(x + (dims.to(tl.int64) * stride_d)[None, :], mask=inside, other=0.0)
    if turn.pairs > 0:
        WIDE: tl.constexpr = tl.float64 if own.dtype == tl.float64 else tl.float32
        turns = dims < 2 * turn.pairs
        if turn.interleaved:
            pair, first, partner = dims // 2, dims % 2 == 0, dims ^ 1
        else:
            first = dims < turn.pairs
            partner = tl.where(first, dims + turn.pairs, dims - turn.pairs)
            pair = tl.minimum(dims, partner)
        inside &= turns[None, :]
        p = tl.maximum(p, 0)
        known = inside & (p < angles.positions)
        at, n = p.to(tl.int64), pair.to(tl.int64)[None, :]
        other = tl.load(x + (partner.to(tl.int64) * stride_d)[None, :], mask=inside, other=0.0).to(WIDE)
        cos = tl.load(angles.cos + at * angles.cos_s + n * angles.cos_d, mask=known, other=float("nan")).to(WIDE)
        sin = tl.load(angles.sin + at * angles.sin_s + n * angles.sin_d, mask=known, other=float("nan")).to(WIDE)
        along, across = own.to(WIDE) * cos, other * sin
        moved = tl.where(first[None, :], along - across, along + across)
        own = tl.where(inside, moved.to(own.dtype), own)
    return own
