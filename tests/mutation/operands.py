"""Features of a call that only mutants need: operands of any shape, bias of any dtype, user functions of our own."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.attention.flex_attention import create_block_mask

from flash import mods
from tests import features
from tests.features import Sizes


def operand(x: torch.Tensor, axes: str) -> torch.Tensor:
    """x [batch, heads, seqlen_q, seqlen_k] with every axis that is not among `axes` (of "bhqk") cut to 1."""
    for axis, letter in enumerate("bhqk"):
        if letter not in axes:
            x = x.narrow(axis, 0, 1)
    return x.clone()


def make_own(name: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """The operands of a feature; what stands after a colon says more: "bias:hq" and "mask:k" name their axes."""
    name, _, detail = name.partition(":")
    batch, seqlen_q, seqlen_k = features.lengths_of(sizes)
    scores = torch.randn(batch, sizes.heads, seqlen_q, seqlen_k)
    if name == "mask":
        mask = operand(scores, detail) > -1.0
        mask[..., 5:8] = "k" not in detail
        return {"mask": mask}
    if name == "bias":
        return {"bias": operand(scores, detail).to(torch.float64 if dtype == torch.float64 else torch.float32)}
    if name == "lowest":  # hides all keys of row 2; what is one step above it does not, as key 4 of row 3 shows
        bias = scores[:1, :1].to(getattr(torch, detail))
        lowest = torch.tensor(torch.finfo(bias.dtype).min, dtype=bias.dtype)
        bias[..., 2:4, :] = bias[..., ::7] = lowest
        bias[..., 3, 4] = torch.nextafter(lowest, -lowest)
        return {"bias": bias}
    if name == "walled":
        walls = torch.arange(seqlen_q) % 9 == 2, torch.arange(seqlen_k) % 9 == 5
        args = tuple(wall.to(torch.int32) for wall in walls)
        return {"score_mod": mods.ScoreMod(walled_score, walled_twin, walled_derivative, args)}
    if name == "document":
        ids = torch.arange(max(seqlen_q, seqlen_k)) // 7 + torch.arange(batch)[:, None]
        return {"mask_mod": mods.document(ids[:, :seqlen_q], ids[:, :seqlen_k] + int(detail or 0))}
    if name == "shared":  # tables without an axis for the batch, or the heads
        ids = torch.arange(max(seqlen_q, seqlen_k)) // 5
        table = mods.relative_position(torch.randn(9), 4)
        return {"mask_mod": mods.document(ids[:seqlen_q], ids[:seqlen_k]), "score_mod": table}
    if name == "prefix_lm":
        return {"mask_mod": mods.prefix_lm(torch.arange(batch) * 4 + 5)}
    if name == "dilated_window":
        return {"mask_mod": mods.dilated_window(2, 3)}
    if name == "neighborhood_2d":
        return {"mask_mod": mods.neighborhood_2d(5, 6, 1)}
    if name == "relative_position":
        return {"score_mod": mods.relative_position(torch.randn(sizes.heads, 9), 4)}
    if name == "alibi":
        return {"score_mod": mods.alibi(torch.rand(batch, sizes.heads))}
    if name == "tanh_softcap":
        return {"score_mod": mods.tanh_softcap(float(detail))}
    if name == "unseen":  # the first sequence sees nothing
        return {"mask": torch.arange(batch)[:, None, None, None] > torch.zeros(seqlen_k)}
    if name == "blocks":  # "32x64": blocks of 32 queries and 64 keys
        size_q, size_k = map(int, detail.split("x"))
        shape = batch, sizes.heads, seqlen_q, seqlen_k
        return {"block_mask": create_block_mask(sieve, *shape, device="cpu", BLOCK_SIZE=(size_q, size_k))}
    if name == "below":  # blocks of so many queries and keys, most of them whole or empty
        shape = None, None, seqlen_q, seqlen_k
        made = create_block_mask(lambda b, h, i, j: j <= i, *shape, device="cpu", BLOCK_SIZE=int(detail))
        return {"block_mask": made}
    raise ValueError(name)


@triton.jit
def walled(i, j, args):
    rows, cols = args
    return (tl.load(rows + i) != 0) | (tl.load(cols + j) != 0)


@triton.jit
def walled_score(s, b, h, i, j, args):
    return tl.where(walled(i, j, args), float("-inf"), s)


@triton.jit
def walled_derivative(s, b, h, i, j, args):
    return tl.where(walled(i, j, args), 0.0, 1.0)


def walled_twin(s: Any, b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    """A score that hides keys, without saying so as a mask does: some queries from all, and all from some queries."""
    rows, cols = args
    return s.masked_fill((rows[i] != 0) | (cols[j] != 0), -math.inf)


def sieve(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A rule with whole blocks of 16, partial ones and empty ones, other ones in each head and batch element."""
    return ((i // 16 + j // 16 + b + h) % 3 != 0) & (((i // 16 + h) % 2 == 0) | ((5 * i + j + b) % 4 != 0))
