"""The nouns of a kernel call: plain NamedTuples, and what a Config may be; importable where Triton is not.

A kernel takes few arguments because related ones travel together: `View` is a tensor with its strides, `Mods` the
optional operands, `Sizes` the lengths, `Spec` and `Shape` what the compiler must know. A field added here reaches every
kernel and every backend.
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
        ahead: multiply q and the next tile of keys before the softmax of this one, so that its exponentials can run
            under a matrix product; of the forward alone. Default: False.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    ahead: bool = False


class Unfit(ValueError):
    """A Config that a kernel cannot be compiled or launched with on a device."""


class Configs(NamedTuple):
    """One Config for each kernel that has tiles."""

    forward: Config
    dkdv: Config
    dq: Config


PLAIN: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "ahead": (False,),
}
LIMITS: dict[str, dict[str, tuple[Any, ...]]] = {  # what a Config may be, by the kernel that it is for
    "forward": PLAIN | {"ahead": (False, True)},
    "dkdv": PLAIN,
    "dq": PLAIN,
    "decode": PLAIN,
    # four warps for each 64 queries of a program, or keys
    "hopper_forward": PLAIN | {"block_m": (128, 192), "num_warps": (8, 12)},
    "hopper_backward": PLAIN | {"block_m": (64,), "block_n": (128,), "num_warps": (8,)},
}


def check_limits(kernel: str, config: Config, name: str = "config") -> None:
    """Check that a Config is one that a kernel may be launched with; whether it fits a GPU is found there.

    Args:
        kernel: a key of LIMITS.
        config: tile sizes and launch options, perhaps not even numbers.
        name: what messages call the Config.

    Raises:
        ValueError: a field is none of what LIMITS allows, or fields do not go together.
    """
    for field, allowed in LIMITS[kernel].items():
        got = getattr(config, field)
        if type(got) is not type(allowed[0]) or got not in allowed:  # True == 1, but is no number of warps
            raise ValueError(f"{name}.{field} must be one of {allowed}, got {got!r:.80}")
    if kernel == "hopper_forward" and 16 * config.num_warps != config.block_m:
        raise ValueError(f"{name} must have 16 queries a warp, block_m 128 or 192, got {config}")


class View(NamedTuple):
    """A [batch, heads, seqlen, head_dim] tensor and the stride of each axis, in elements."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any
    stride_d: Any


class Sizes(NamedTuple):
    """Lengths of a call, known when it runs; kernels are given them by `launch.coded`."""

    heads: int
    seqlen_q: int  # of one sequence; where sequences are packed, of all of them until `tile.place` has found the one
    seqlen_k: int
    batch: int  # sequences
    q_offset: int  # position of query 0 among the keys; unused where Mods.q_offset is given
    left: int  # keys seen before a query's own position, where Spec.left
    right: int  # and after it, where Spec.right


class Positions(NamedTuple):
    """Which keys a query sees by its position: the members of `Sizes` that the user chooses."""

    q_offset: int = 0
    left: int = 0
    right: int = 0


class Shape(NamedTuple):
    """Compile-time sizes of a call. A head dimension is padded in registers, never in memory."""

    group: int  # query heads that share one key and value head
    head_dim: int
    head_dim_v: int
    block_d: int  # the power of two, at least 16, that holds head_dim
    block_dv: int  # the same for head_dim_v


class Blocks(NamedTuple):
    """A block-sparse mask over blocks of queries and keys, [batch or 1, heads or 1, ...], int32.

    Args:
        state: [.., query blocks, key blocks]; -1 where no pair is visible, -2 where all are, else an index of bits.
        bits: [partial blocks, queries of a block, ceil(keys of a block / 32)], bit j % 32 of word j // 32 for key j.
        keys: [.., query blocks, key blocks], for each query block the key blocks that it sees: whole ones, then others.
        key_counts: [.., query blocks, 2], how many it sees whole, and how many in part.
        queries: [.., key blocks, query blocks], for each key block the query blocks that see it, likewise.
        query_counts: [.., key blocks, 2].
    """

    state: Any
    bits: Any
    keys: Any
    key_counts: Any
    queries: Any
    query_counts: Any


class Spans(NamedTuple):
    """Bounds on what is visible, so that tiles beyond are never loaded; int32 [batch or 1, heads or 1, seqlen or 1].

    Args:
        key_begin: of each query, the first key that it may see.
        key_end: and one past the last; key_begin and key_end of a query that sees none are seqlen_k and 0.
        query_begin: of each key, the first query that may see it.
        query_end: and one past the last; seqlen_q and 0 of a key that none sees.
    """

    key_begin: Any
    key_end: Any
    query_begin: Any
    query_end: Any


class Mods(NamedTuple):
    """Optional operands of a call, as tensors of torch; an absent one is None."""

    q_offset: Any = None  # int32 or int64 [batch], read on the device; stands in for Positions.q_offset
    mask: Any = None  # bool [batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1], True = visible
    bias: Any = None  # any float, likewise; -inf, or its dtype's lowest number, hides the key
    alibi_slopes: Any = None  # any float [batch or 1, heads]
    sinks: Any = None  # any float [heads]
    seed: Any = None  # int64 [1], the key of dropout's Philox
    starts_q: Any = None  # int32 [batch + 1], where packed sequences start; never decreasing, within 0 and total_q
    starts_k: Any = None  # likewise, for keys
    bad: Any = None  # bool [batch], the sequences whose lengths were hostile: their rows are NaN
    origin: Any = None  # int32 [batch or 1, 4]: batch element, head, query and key of the whole that a part begins at
    blocks: Blocks | None = None
    spans: Spans | None = None
    score_mod: Any = None  # flash.mods.ScoreMod
    mask_mod: Any = None  # flash.mods.MaskMod


class Operands(NamedTuple):
    """What a kernel is given of Mods: pointers and Views. An absent one is None and leaves no trace in the code."""

    q_offset: Any = None  # pointer
    mask: Any = None  # View of bytes
    bias: Any = None  # View
    slopes: Any = None  # View; only the first two axes have strides, and of sinks the second
    sinks: Any = None  # View
    bias_tangent: Any = None  # Views of tangents, of forward mode
    slopes_tangent: Any = None
    sinks_tangent: Any = None
    seed: Any = None  # pointer
    starts_q: Any = None  # pointer
    starts_k: Any = None  # pointer
    bad: Any = None  # pointer to bytes
    origin: Any = None  # View; only the first axis and the last have strides
    tiles: Any = None  # pointer to int32 [batch + 1]: how many tiles the packed sequences before each one have
    # Blocks and Spans member by member: Triton 3.6 loses a stride of 1 in a View two tuples deep.
    state: Any = None  # View
    bits: Any = None  # pointer
    keys: Any = None  # Views from here on
    key_counts: Any = None
    queries: Any = None
    query_counts: Any = None
    key_begin: Any = None
    key_end: Any = None
    query_begin: Any = None
    query_end: Any = None
    score_fn: Any = (
        None  # @triton.jit functions, never constants: a constant of the same name would reuse the old kernel
    )
    score_derivative: Any = None
    score_args: Any = None  # pointers
    mask_fn: Any = None
    mask_args: Any = None


class Cache(NamedTuple):
    """Keys and values of sequences that grow, tensors of torch: a slot for each sequence, or pages that a table lists.

    Args:
        k: [slots, heads_k, max_seqlen, head_dim]; with a table [pages, heads_k, page_size, head_dim]. Any strides.
        v: likewise, of head_dim_v.
        seqlens: int32 [batch], keys that each sequence has; those of this call not counted.
        table: int32 [slots, max_pages]: position p of a sequence is in page table[slot, p // page_size]; or None.
        slots: int32 [batch], the slot of each sequence; None: its own number.
        leftpad: int32 [batch], keys at the front that nobody sees, and that positions of rotary embedding leave out.
        k_scale: float32 [batch or 1, heads_k or 1], what stored keys are multiplied by; None: 1.
        v_scale: likewise for values.
    """

    k: Any
    v: Any
    seqlens: Any
    table: Any = None
    slots: Any = None
    leftpad: Any = None
    k_scale: Any = None
    v_scale: Any = None


class Rotary(NamedTuple):
    """Rotary position embedding: pairs of a head's first 2 * cos.shape[1] dimensions turn with the position.

    Args:
        cos: [positions, pairs], of any float dtype.
        sin: likewise.
        interleaved: pair n is dimensions 2n and 2n + 1 (GPT-J), in place of n and n + pairs (GPT-NeoX).
    """

    cos: Any
    sin: Any
    interleaved: bool = False


class Site(NamedTuple):
    """Where a tile of scores lies."""

    b: Any  # the sequence
    h: Any  # the query head
    i: Any  # queries, [M, 1] or [1, M], counted from the sequence's first
    j: Any  # keys, [1, N] or [N, 1]
    offset: Any  # position of query 0 among the keys
    q0: Any  # where the sequence's queries and keys start among the packed ones
    k0: Any


class Tangents(NamedTuple):
    """What the kernel of forward mode is given: tangents of q, k and v, and room for those of o and lse."""

    q: Any  # Views; None stands for zero
    k: Any
    v: Any
    o: Any
    lse: Any  # pointer


class Gradients(NamedTuple):
    """One thing for each operand that a gradient can be asked for: whether it is, or the gradient (None: not asked).

    Kernels are given Views of those they compute, and of alibi_slopes a pointer to each query's share.
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None


class Spec(NamedTuple):
    """Compile-time choices of a call: one kernel is compiled per value. Holds no function and no tensor."""

    causal: bool = False  # key j is visible when j <= i + q_offset; then `right` is False
    left: bool = False  # and when j >= i + q_offset - Positions.left
    right: bool = False  # and when j <= i + q_offset + Positions.right
    hides: bool = (
        False  # mask, bias, mask_mod or blocks beside another mask: each visited pair is asked if it is visible
    )
    softcap: float | None = None
    dropout_p: float = 0.0
    blocks: tuple[int, int] | None = None  # queries and keys in a block of Mods.blocks
    raw: bool = True  # scores stay q.k up to the exponent; wants a positive scale and nothing that changes a score
    precision: str = "ieee"  # how float32 tiles are multiplied: "ieee", "tf32x3" or "tf32"
    # some of a call's keys: o, dq, dk and dv leave in the accumulator's dtype, as what they are added to will round
    part: bool = False
    # What follows from Mods, filled in by `launch.prepare`: whether an operand has an axis of queries, and one of keys.
    mask_rows: bool = False
    mask_cols: bool = False
    bias_rows: bool = False
    bias_cols: bool = False
    threshold: int = 0  # dropout_p in units of 2**-32


def accumulator_dtype(x: torch.Tensor) -> torch.dtype:
    """What scores and sums are held in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def output_dtype(x: torch.Tensor, spec: Spec) -> torch.dtype:
    """What o leaves in for q, and a gradient for its operand: x's own dtype, or the accumulator's of a part."""
    return accumulator_dtype(x) if spec.part else x.dtype


def dense_like(
    q: torch.Tensor, head_dim_v: int, device: str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An empty [batch, heads, seqlen_q, head_dim_v], dense, its axes in the order that q's have in memory."""
    if head_dim_v == q.shape[3]:
        return torch.empty_like(q, device=device, dtype=dtype)
    strides = torch.empty_like(q, device="meta").stride()
    order = sorted(range(4), key=lambda axis: -strides[axis])
    sizes = (*q.shape[:3], head_dim_v)
    dense = q.new_empty([sizes[axis] for axis in order], device=device, dtype=dtype)
    return dense.permute([order.index(axis) for axis in range(4)])
