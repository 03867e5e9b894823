"""The nouns of a kernel call: plain NamedTuples, importable where Triton is not.

A kernel takes few arguments because related ones travel together: `View` is a tensor with its strides, `Mods` the
optional operands, `Sizes` the lengths, `Spec` and `Shape` what the compiler must know. A field added here reaches every
kernel.
"""

from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel.

    Args:
        block_m: query rows in a tile, a power of two, 16 to 256.
        block_n: keys in a tile, a power of two, 16 to 256.
        num_warps: warps (32 threads; 64 on AMD) that share a tile: 1, 2, 4, 8 or 16.
        num_stages: tiles in flight from memory, 1 to 8.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


class Configs(NamedTuple):
    """One Config for each kernel that has tiles."""

    forward: Config
    dkdv: Config
    dq: Config


class View(NamedTuple):
    """A [batch, heads, seqlen, head_dim] tensor and the stride of each axis, in elements."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_s: int
    stride_d: int


class Sizes(NamedTuple):
    """Lengths of a call, known when it runs."""

    heads: int
    seqlen_q: int
    seqlen_k: int
    q_offset: int  # position of query 0 among the keys; unused where Mods.q_offset is given


class Shape(NamedTuple):
    """Compile-time sizes of a call. A head dimension is padded in registers, never in memory."""

    group: int  # query heads that share one key and value head
    head_dim: int
    head_dim_v: int
    block_d: int  # the power of two, at least 16, that holds head_dim
    block_dv: int  # the same for head_dim_v


class Mods(NamedTuple):
    """Optional operands of the score. An absent one is None and leaves no trace in the compiled kernel."""

    q_offset: Any = None  # int32 [batch], read on the device; stands in for Sizes.q_offset


class Spec(NamedTuple):
    """Compile-time choices of a call: one kernel is compiled per value. Holds no function and no tensor."""

    causal: bool = False
    raw: bool = True  # scores stay q.k up to the exponent; wants a positive scale and nothing that changes a score
    precision: str = "ieee"  # how float32 tiles are multiplied: "ieee", "tf32x3" or "tf32"


def dense_like(q: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    """An empty [batch, heads, seqlen_q, head_dim_v], dense, its axes in the order that q's have in memory."""
    if head_dim_v == q.shape[3]:
        return torch.empty_like(q)
    strides = torch.empty_like(q, device="meta").stride()
    order = sorted(range(4), key=lambda axis: -strides[axis])
    sizes = (*q.shape[:3], head_dim_v)
    return q.new_empty([sizes[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
