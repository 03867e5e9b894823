"""What dropout kept in a forward pass, as bits for the passes that come back to it.

Drawing is most of what dropout costs in torch, and the backward pass needs the weights that the forward kept. They stay
with the seed: a tensor of its own for each call, which lives until the graph that saved it is gone, and the bits go
with it. A caller says how many bytes may stay; what does not fit is drawn again, and is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

GATHER = 0x0102040810204080  # takes bit 0 of byte t to bit 56 + t; no two of its sums share a bit
SPREAD = 0x0101010101010101  # a byte, eight times
EACH = 0x8040201008040201 - 2**64  # bit t of byte t
ENTRY = 1024  # bytes that Python and torch take for an entry, rather more than less

Place = tuple[float, ...]


@dataclass
class Kept:
    """What stayed of a batch element: uint8 bits by place and shape, and how many bytes they take."""

    bits: dict[tuple[Place, tuple[int, ...]], Tensor] = field(default_factory=dict)
    size: int = 0


held: Any = WeakTensorKeyDictionary()  # of a seed: batch element -> Kept


def recalled(
    seed: Tensor, b: int, place: Place, shape: tuple[int, ...], room: int, draw: Callable[[], Tensor]
) -> Tensor:
    """What `draw` says of a place, bool of that shape: said anew, or what it said when it was asked before.

    Args:
        seed: the tensor that the answer lives with.
        b: batch element, or packed sequence.
        place, shape: of the answer, which tell it from others of that seed and element.
        room: bytes that may stay for b.
        draw: called where nothing stayed.
    """
    ours, key = held.setdefault(seed, {}).setdefault(b, Kept()), (place, shape)
    if key in ours.bits:
        return unpacked(ours.bits[key], shape)
    keep = draw()
    size = -(-keep.numel() // 8) + ENTRY
    if ours.size + size <= room:
        ours.bits[key] = packed(keep)
        ours.size += size
    return keep


def packed(keep: Tensor) -> Tensor:
    """bool of any shape as uint8 [numel / 8, rounded up], element t of eight at bit t."""
    flat = keep.contiguous().view(torch.uint8).flatten()
    if len(flat) % 8:
        flat = pad(flat, (0, -len(flat) % 8))
    return (flat.view(torch.int64) * GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `packed` was given."""
    flat = bits.to(torch.int64).mul_(SPREAD).bitwise_and_(EACH).view(torch.uint8).clamp_(max=1)
    return flat.view(torch.bool)[: prod(shape)].view(shape)
