"""What flash-attn's functions are called with, and answer with, in the words of flash_attention."""

from collections.abc import Sequence
from typing import Any

import torch


def keywords_of(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> dict[str, Any]:
    """flash_attention's keywords."""
    if not hasattr(window_size, "__len__") or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")
    if not isinstance(softcap, (int, float)):
        raise ValueError(f"softcap must be a float, 0.0 for none, got {softcap!r}")
    left, right = (None if side < 0 else side for side in map(int, window_size))  # tensors come here too
    return dict(
        scale=softmax_scale,
        causal=causal,
        window=None if left is None and right is None else (left, right),
        softcap=softcap if softcap > 0 else None,
        alibi_slopes=alibi_slopes,
    )


def check_axes(name: str, x: torch.Tensor, axes: str) -> None:
    """Check that x has these axes; one that is a number is of that size."""
    wanted = axes.strip("[]").split(", ")
    sizes = zip(wanted, x.shape, strict=False)
    if x.dim() != len(wanted) or any(axis.isdigit() and int(axis) != size for axis, size in sizes):
        raise ValueError(f"{name} must be {axes}, got shape {list(x.shape)}")


def closed(lse: torch.Tensor) -> torch.Tensor:
    """lse as flash-attn has it: +inf where a query sees no key."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))
