"""The running softmax: maximum m, sum l and unnormalised output acc of the keys seen so far, for each row.

    p   = exp(s - m)                 l <- l exp(m_old - m) + sum_j p_j
    acc <- acc exp(m_old - m) + p v
    o   = acc / l                    lse = m + log l

A sink is one more score in l, without a value. Dropout leaves l alone and thins out what acc takes in. Results over
parts of the keys merge as keys do: each is a value o whose score is its lse.

(Milakov & Gimelshein 2018, Algorithm 3; Dao 2023, Algorithm 1.) Exponentials are base 2. Half-precision inputs fold the
unit into one multiply-add; float32 and float64 subtract first, so that large scores keep their last bits.
"""

import triton
import triton.language as tl

from . import tile
from .score import LOG2E, numbered

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(s, m, unit, PRECISE: tl.constexpr):
    """exp of s - m, both in units of score worth `unit` in base 2; m broadcasts against s."""
    if PRECISE:
        return tl.exp2((s - m) * unit)
    else:
        return tl.exp2(s * unit - m * unit)


@triton.jit
def step(s, m, l, unit, PRECISE: tl.constexpr):
    """Take in a tile of scores [M, N]: (p [M, N], factor of the old acc [M], m [M], l [M])."""
    m_new = tl.maximum(m, tl.max(s, 1))
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key stays finite
    p = exponential(s, pivot[:, None], unit, PRECISE)
    alpha = exponential(m, pivot, unit, PRECISE)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def merge(o, lse, m, l, acc):
    """Results o [N, D] and lse [N] over other keys join a row: (m [1], l [1], acc [1, D])."""
    p, alpha, m, l = step(lse[None, :], m, l, LOG2E, True)
    return m, l, acc * alpha[:, None] + tl.sum(p[:, :, None] * o[None, :, :], 1)


@triton.jit
def finish(acc, m, l, natural, mods, b, h):
    """(o [M, D], lse [M]); a row without keys has o = 0 and lse = -inf, or the sink."""
    weight, l, lse = totals(m, l, natural, mods, b, h)
    if mods.sinks is not None:
        acc = acc * weight[:, None]
    return acc / l[:, None], lse


@triton.jit
def totals(m, l, natural, mods, b, h):
    """(weight, divisor, lse), each [M]: o is acc weight / divisor; without sinks the weight stands for 1."""
    m = m * natural
    weight = l
    if mods.sinks is not None:
        sink = tl.load(tile.origin(mods.sinks, b, h)).to(m.dtype)
        top = tl.maximum(m, sink)
        pivot = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2((m - pivot) * LOG2E)
        l = l * weight + tl.exp2((sink - pivot) * LOG2E)
        m = top
    return weight, tl.where(l == 0.0, 1.0, l), m + tl.log2(l) * LN2


@triton.jit
def thinned(x, at, mods, spec: tl.constexpr):
    """x with some elements 0 and the others scaled up: drawn by Philox4x32-10 (Salmon et al. 2011), not by the tile."""
    if spec.dropout_p > 0.0:
        b, h, i, j = numbered(at, at.i, at.j, mods)
        drawn, _, _, _ = tl.philox(tl.load(mods.seed), j, i, h, b)
        return tl.where(drawn >= spec.threshold, x * (1.0 / (1.0 - spec.dropout_p)), 0.0)
    else:
        return x


@triton.jit
def probability(s, lse, natural, unit, PRECISE: tl.constexpr):
    """exp(s - lse), s in units of score and lse natural; 0 where lse is +inf.

    s may round otherwise than in the forward. Among huge scores that is a large difference, so p is held to at most 1.
    """
    if PRECISE:
        x = (s * natural - lse) * (1 / LN2)
    else:
        x = s * unit - lse * (1 / LN2)
    return tl.exp2(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def closed(lse):
    """lse, with +inf for rows without keys (-inf), so that their probabilities are 0 and not NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse)
