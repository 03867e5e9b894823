"""Keys and values of one sequence of a cache, copied: pages gathered, narrow numbers widened, and scaled.

A copy is made head by head, as of several heads torch moves the numbers of a page one by one; and what lies between is
small, as of large blocks glibc gets every page of memory anew.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 2**18  # numbers at once, where they are not copied as they are
SMALL = 256  # positions of a page that is moved whole, whichever of them are asked for
NAN = 0x7F  # float8_e4m3fn's, without a sign; it has no infinity


class Places(NamedTuple):
    """Where some of a sequence's positions lie in a cache."""

    pages: list[int]  # those that have them in turn; of a cache without pages, its slot
    rows: slice  # counted from the first page's beginning
    table: Tensor | None = None  # int64, pages on the device, where there are several


class Buffer:
    """Memory for one tensor after another, of the dtype and device of one that is given."""

    def __init__(self, like: Tensor) -> None:
        self.held = like.new_empty(0)

    def shaped(self, *shape: int) -> Tensor:
        """A tensor that is not initialised, in place of the one before."""
        if len(self.held) < prod(shape):
            self.held = self.held.new_empty(prod(shape))
        return self.held[: prod(shape)].view(shape)


def copy(x: Tensor, heads_k: slice, places: Places, factor: Tensor | None, buffer: Buffer) -> Tensor:
    """Keys or values [1, heads_k, keys, d], in a buffer whose dtype holds x's exactly.

    Args:
        x: [pages, heads, page_size, d], any strides.
        heads_k: which heads.
        places: which pages and rows.
        factor: what each head is multiplied by, [heads or 1]; None: 1.
        buffer: where they go.
    """
    x, (pages, rows, table) = x[:, heads_k], places
    heads, size, width = x.shape[1:]
    if table is not None and size <= SMALL:
        found = buffer.shaped(heads, len(pages) * size, width)
        for head in range(heads):
            gather(x[:, head], table, found[head].view(-1, size, width))
        found = found[:, rows]
    else:
        found = buffer.shaped(heads, rows.stop - rows.start, width)
        for page, number in enumerate(pages):
            at = page * size - rows.start
            start, stop = max(-at, 0), min(rows.stop - page * size, size)
            most = max(1, PIECE // (heads * width))
            own = x[number, :, start:stop].split(most, 1), found[:, at + start : at + stop].split(most, 1)
            for part, into in zip(*own, strict=True):
                widen(part, into)
    if factor is not None:
        found *= (factor[heads_k] if len(factor) > 1 else factor).to(found.dtype)[:, None, None]
    return found.unsqueeze(0)


def gather(x: Tensor, table: Tensor, into: Tensor) -> None:
    """Pages of x [pages, page_size, d] that a table lists."""
    if x.dtype == into.dtype:
        torch.index_select(x, 0, table, out=into)
        return
    most = max(1, PIECE // (x.shape[1] * x.shape[2]))
    for some, part in zip(table.split(most), into.split(most), strict=True):
        widen(bits(x).index_select(0, some).view(x.dtype), part)


def widen(x: Tensor, into: Tensor) -> None:
    """x into a tensor whose dtype holds its numbers exactly; float8 faster than torch converts it on a CPU."""
    if x.dtype != torch.float8_e4m3fn or not x.numel() or int(bits(x).bitwise_and(NAN).amax()) == NAN:
        into.copy_(x)
        return
    # s eeee mmm: three bits of mantissa for float16's ten, and an exponent counted from 7 where float16's is from 15
    half = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    into.copy_(half).mul_(2.0**8)


def bits(x: Tensor) -> Tensor:
    """x, float8 as bytes: torch indexes those on every device."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
