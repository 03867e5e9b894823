"""The validated call: whatever is wrong with an argument is said here or nowhere.

`Problem` is the one noun that replaces argument lists between the public function, dispatch, autograd and the kernels.
What a single argument must be is in `flash.checks`; here they come together, and what follows from them is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .blocks import blocks_of, sizes_of
from .checks import (
    BACKENDS,
    DTYPES,
    KERNELS,
    MAX_HEAD_DIM,
    MAX_SEQLEN,
    ConfigLike,
    Window,
    check_backend,
    check_bias,
    check_block_mask,
    check_config,
    check_dropout,
    check_flag,
    check_lengths,
    check_mask,
    check_mod,
    check_q_offset,
    check_scale,
    check_sinks,
    check_slopes,
    check_softcap,
    check_spans,
    check_tensors,
    check_window,
    name_of,
)
from .kernels.spec import Config, Mods, Positions, Spans, Spec
from .twins import MaskMod, ScoreMod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # slow to import, and whoever has one has done so

__all__ = [
    "BACKENDS", "DTYPES", "KERNELS", "MAX_HEAD_DIM", "MAX_SEQLEN", "PACKING", "ConfigLike", "Options", "Problem",
    "Window", "check_flag",
    "name_of", "precision_of",
]  # fmt: skip


PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class Options(NamedTuple):
    """The keywords of `flash.attention.flash_attention` that make a Problem, with their defaults."""

    causal: bool = False
    window: Window = None
    q_offset: int | torch.Tensor | None = None
    scale: float | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    block_mask: "BlockMask | None" = None
    deterministic: bool | None = None
    backend: str = "auto"
    config: ConfigLike = None


@dataclass(frozen=True)
class Problem:
    """A call of attention, checked and in the form that every backend takes.

    Args:
        q: [batch, heads, seqlen_q, head_dim]; where sequences are packed, batch is 1 and seqlen_q all of them.
        k: [batch, heads_k, seqlen_k, head_dim].
        v: [batch, heads_k, seqlen_k, head_dim_v].
        mods: optional operands of the score; the seed of dropout is drawn later.
        spec: compile-time choices.
        scale: factor of q.k.
        positions: which keys a query sees by its position, within 32 bits; Mods.q_offset stands in for
            Positions.q_offset where given.
        backend: "auto", "triton", "hopper" or "torch".
        configs: for each of the kernels forward, dkdv and dq the user's Config, or None for the tuned one.
        one_head: q, k and v came without an axis of heads.
        deterministic: gradients must repeat bit for bit.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mods: Mods
    spec: Spec
    scale: float
    positions: Positions
    backend: str
    configs: tuple[Config | None, Config | None, Config | None]
    one_head: bool
    deterministic: bool = False

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        **keywords: Any,
    ) -> "Problem":
        """Check the arguments of `flash.attention.flash_attention` and build the Problem.

        With any of cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k the call is packed, one of
        `flash.attention.flash_attention_varlen`. keywords are those of `Options`.

        Raises:
            ValueError: an argument is wrong.
            TypeError: a user function or a block mask is not one.
            NotImplementedError: an argument asks for what is not served.
        """
        x = Options(**keywords)
        packed = not (cu_seqlens_q is None and cu_seqlens_k is None and max_seqlen_q is None and max_seqlen_k is None)
        q, k, v = autocast(q, k, v)
        q, k, v, one_head = check_tensors(q, k, v, packed)
        device, heads, seqlen_q, seqlen_k = q.device, q.shape[1], q.shape[2], k.shape[2]
        check_flag("causal", x.causal)
        deterministic = x.deterministic
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        check_flag("deterministic", deterministic)
        check_backend(x.backend)
        configs = check_config(x.config, x.backend)
        left, right = check_window(x.window)
        scale, softcap, dropout_p = (
            check_scale(x.scale, q.shape[3]),
            check_softcap(x.softcap),
            check_dropout(x.dropout_p),
        )

        starts_q = starts_k = bad = None
        batch, shape = q.shape[0], (q.shape[0], heads, seqlen_q, seqlen_k)
        if packed:
            batch = check_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, device)
            starts_q, starts_k, bad = sequences(cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k)
            shape = (batch, heads, max_seqlen_q, max_seqlen_k)  # type: ignore[assignment]
        offset, offsets = 0, None
        q_offset = x.q_offset
        if q_offset is not None:
            q_offset = check_q_offset(q_offset, batch, device)
        if isinstance(q_offset, torch.Tensor):
            offsets = q_offset
        elif packed:
            at_end = starts_k.diff() - starts_q.diff()  # type: ignore[union-attr]
            offsets = (
                at_end if q_offset is None else torch.full_like(at_end, min(max(q_offset, -MAX_SEQLEN), MAX_SEQLEN))
            )
        else:
            offset = seqlen_k - seqlen_q if q_offset is None else q_offset

        mask, bias, alibi_slopes, sinks = x.mask, x.bias, x.alibi_slopes, x.sinks
        if mask is not None:
            mask = check_mask(mask, shape, one_head, device)
        if bias is not None:
            bias = check_bias(bias, shape, one_head, device)
        if packed:
            bad = too_long(bad, starts_q, starts_k, mask, bias)
        if alibi_slopes is not None:
            alibi_slopes = check_slopes(alibi_slopes, batch, heads, device)
        if sinks is not None:
            sinks = check_sinks(sinks, heads, device)
        for name, mod in (("score_mod", x.score_mod), ("mask_mod", x.mask_mod)):
            if mod is not None:
                check_mod(name, mod, shape, device)
        blocks = block_sizes = None
        block_mask = x.block_mask
        if block_mask is not None:
            check_block_mask(block_mask, (q.shape[0], heads, seqlen_q, seqlen_k), device)
            block_q, block_k = sizes_of(block_mask, seqlen_q, seqlen_k)
            block_sizes = index(block_q), index(block_k)  # which makes constants of symbolic ones
            blocks = blocks_of(block_mask, q.shape[0], heads, seqlen_q, seqlen_k)

        spans = None if packed else spans_of(mask, x.mask_mod, shape, device)
        mods = Mods(
            q_offset=offsets, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, starts_q=starts_q,
            starts_k=starts_k, bad=bad, blocks=blocks, spans=spans, score_mod=x.score_mod, mask_mod=x.mask_mod,
        )  # fmt: skip
        right = None if x.causal else right  # 0 is tighter
        banded = x.causal or left is not None or right is not None
        hides = mask is not None or bias is not None or x.mask_mod is not None
        # a positive scale that float32 holds can wait for the exponent; any other multiplies the score
        raw = True if 1e-30 < scale < 1e30 else False  # a branch, which makes a constant of a symbolic scale
        spec = Spec(
            causal=x.causal,
            left=left is not None,
            right=right is not None,
            hides=hides or (blocks is not None and (banded or packed)),
            softcap=softcap,
            dropout_p=dropout_p,
            blocks=block_sizes,
            raw=raw and softcap is None and bias is None and alibi_slopes is None and x.score_mod is None,
            precision=precision_of(q),
        )
        positions = positions_of(offset, left, right)
        return cls(q, k, v, mods, spec, scale, positions, x.backend, configs, one_head, deterministic)


def positions_of(offset: int, left: int | None, right: int | None) -> Positions:
    """The Positions within 32 bits: what is clamped is where the window begins and ends, not how far it reaches."""

    def held(position: int) -> int:
        return min(max(position, -MAX_SEQLEN), MAX_SEQLEN)

    begin = held(offset) if left is None else held(offset - left)
    end = held(offset) if right is None else held(offset + right)
    return Positions(held(offset), held(offset) - begin, end - held(offset))


def sequences(
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, total_q: int, total_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where packed sequences start, safe to read by, and which of them [batch] are bad; nothing waits for the device.

    Starts are int32 [batch + 1], the running maximum within 0 and the total: whatever came, each row has at most one
    owner, and it lies in the tensor. A sequence is bad where that changed one of its ends.
    """
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    starts_q = cu_seqlens_q.cummax(0).values.clamp(0, total_q)
    starts_k = cu_seqlens_k.cummax(0).values.clamp(0, total_k)
    changed = (starts_q != cu_seqlens_q) | (starts_k != cu_seqlens_k)
    return starts_q, starts_k, changed[:-1] | changed[1:]


def too_long(bad: Any, starts_q: Any, starts_k: Any, mask: Any, bias: Any) -> torch.Tensor:
    """bad [batch], also where a sequence is longer than an axis of the mask or bias that it would be read from."""
    for x in (mask, bias):
        for starts, axis in ((starts_q, 2), (starts_k, 3)):
            if x is not None and x.shape[axis] != 1:
                bad = bad | (starts.diff() > x.shape[axis])
    return bad  # type: ignore[no-any-return]


def spans_of(
    mask: torch.Tensor | None, mask_mod: MaskMod | None, shape: Sequence[int], device: torch.device
) -> Spans | None:
    """Bounds on what a dense call's queries see, from a mask alike for all queries and from a MaskMod's own spans."""
    seqlen_q, seqlen_k = shape[2:]
    if seqlen_q == 0 or seqlen_k == 0:
        return None
    found = None
    if mask is not None:
        found = padding_spans(mask, seqlen_q, seqlen_k)
    if mask_mod is not None and mask_mod.spans is not None:
        more = check_spans(mask_mod.spans(seqlen_q, seqlen_k, mask_mod.args), shape, device)
        found = more if found is None else intersection(found, more)
    return found


def padding_spans(mask: torch.Tensor, seqlen_q: int, seqlen_k: int) -> Spans | None:
    """The spans of a mask [batch|1, heads|1, 1, seqlen_k|1], whose axis of queries may be expanded; None of another."""
    for axis in range(3):
        if mask.shape[axis] > 1 and mask.stride(axis) == 0:  # all alike: look at one
            mask = mask.narrow(axis, 0, 1)
    if mask.shape[2] != 1 or seqlen_k == 0 or 0 in mask.shape:
        return None
    keys = mask.squeeze(2)  # [batch|1, heads|1, seqlen_k|1]
    j = torch.arange(seqlen_k, dtype=torch.int32, device=mask.device)
    key_begin = torch.where(keys, j, seqlen_k).amin(-1, keepdim=True)
    key_end = torch.where(keys, j + 1, 0).amax(-1, keepdim=True)
    begin, end = torch.where(keys, 0, seqlen_q), torch.where(keys, seqlen_q, 0)
    return Spans(*(x.to(torch.int32) for x in (key_begin, key_end, begin, end)))


def intersection(one: Spans, other: Spans) -> Spans:
    """The spans of what both allow."""
    return Spans(
        torch.maximum(one.key_begin, other.key_begin),
        torch.minimum(one.key_end, other.key_end),
        torch.maximum(one.query_begin, other.query_begin),
        torch.minimum(one.query_end, other.query_end),
    )


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """q, or q, k and v, in autocast's dtype where it is on; float64 stays, as in scaled_dot_product_attention."""
    for name, x in zip("qkv", tensors, strict=False):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def precision_of(q: torch.Tensor) -> str:
    """How float32 tiles are multiplied: tf32 only where the user's torch setting allows it."""
    if q.dtype != torch.float32 or q.device.type != "cuda" or torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
