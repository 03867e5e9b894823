"""Rotary position embedding in torch: pairs of a head's dimensions turn by an angle that grows with the position."""

import torch

from .kernels.spec import Rotary, accumulator_dtype


def turned(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """x [batch, heads, rows, d], its pairs turned as the kernels turn them.

        (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
        x: any float dtype and strides.
        positions: integers [batch or 1, rows]; one below 0 counts as 0, one past the tables' end makes NaN.
        rotary: the tables, and which dimensions make a pair.

    Returns:
        A new tensor like x.
    """
    wide = accumulator_dtype(x)
    last = rotary.cos.shape[0] - 1
    known = (positions <= last)[..., None]
    cos, sin = (
        table[positions.clamp(0, last)].to(wide).where(known, float("nan"))[:, None]  # [batch or 1, 1, rows, pairs]
        for table in (rotary.cos, rotary.sin)
    )
    pairs = cos.shape[-1]
    one, other = slice(0, pairs), slice(pairs, 2 * pairs)
    if rotary.interleaved:
        one, other = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    y = x.to(wide, copy=True)
    a, b = x[..., one].to(wide), x[..., other].to(wide)
    y[..., one] = a * cos - b * sin
    y[..., other] = a * sin + b * cos
    return y.to(x.dtype)
