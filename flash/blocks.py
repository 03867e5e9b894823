"""torch's BlockMask as kernels read it: the state of each block, and bits of those that are visible in part.

A BlockMask says which blocks are visible whole, and which in part by a Python closure for single indices. The closure
is asked once, for the pairs of partial blocks only, and its answers are kept on the BlockMask as bits.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .kernels.spec import Blocks

if TYPE_CHECKING:  # slow to import, and whoever has a BlockMask has done so
    from torch.nn.attention.flex_attention import BlockMask

PAIRS = 2**22  # asked at a time: 4 MiB of answers, and the closure's own temporaries
HIDDEN, WHOLE = -1, -2  # of Blocks.state


def sizes_of(block_mask: "BlockMask", seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Queries and keys in a block: BLOCK_SIZE, but no more than the power of two, at least 128, that holds them all."""
    size_q, size_k = block_mask.BLOCK_SIZE
    held_q, held_k = (max(128, 1 << max(n - 1, 0).bit_length()) for n in (seqlen_q, seqlen_k))
    return min(size_q, held_q), min(size_k, held_k)


def blocks_of(block_mask: "BlockMask", batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Blocks:
    """The Blocks of a BlockMask, made the first time that it meets these lengths.

    The first time costs one host-device synchronisation, O(blocks) memory and one bit for each pair in partial blocks.
    Later, the BlockMask's tensors and its mask_mod are looked at for changes, but not what its mask_mod closes over.
    Under torch.compile(fullgraph=True) the first time must have been before.

    Args:
        block_mask: of [batch or 1, heads or 1, query blocks, key blocks]; missing leading axes are 1. Where an axis is
            1, its mask_mod is asked with index 0.
        batch: of the call.
        heads: query heads of the call.
        seqlen_q: queries of the call; pairs past them are not visible.
        seqlen_k: keys of the call, likewise.

    Returns:
        Blocks on the BlockMask's device, for blocks of `sizes_of`.

    Raises:
        ValueError: block_mask does not cover the call.

    Source: Dong et al. 2024, "Flex Attention", https://arxiv.org/abs/2412.05496.
    """
    cache = block_mask.__dict__.setdefault("_flash_blocks", {})
    marks = _marks(block_mask)
    found = cache.get((seqlen_q, seqlen_k))
    if found is None or not all(map(_same, found[0], marks)):
        with torch.inference_mode(False), outside_transforms():  # what is kept must do for every later call
            found = cache[seqlen_q, seqlen_k] = marks, _build(block_mask, seqlen_q, seqlen_k)
    blocks: Blocks = found[1]
    shape = tuple(blocks.state.shape[:2])
    if shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(f"block_mask must be of batch 1 or {batch} and heads 1 or {heads}, got {shape}")
    return blocks


def outside_transforms() -> AbstractContextManager[Any]:
    """No transform of torch.func wraps what is made in here."""
    if not torch._C._are_functorch_transforms_active():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    cleared: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return cleared


def _lists(block_mask: "BlockMask") -> tuple[Any, ...]:
    """Counts and indices of partial blocks, then of whole ones."""
    whole = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    return block_mask.kv_num_blocks, block_mask.kv_indices, *whole


def _marks(block_mask: "BlockMask") -> list[tuple[Any, int]]:
    """What a cached result depends on, with its version."""
    parts = (*_lists(block_mask), block_mask.mask_mod)
    if torch.compiler.is_compiling():  # versions are hidden from it
        return [(x, -1) for x in parts]
    counted = (isinstance(x, torch.Tensor) and not x.is_inference() for x in parts)
    return [(x, x._version if count else 0) for x, count in zip(parts, counted, strict=True)]


def _same(kept: tuple[Any, int], now: tuple[Any, int]) -> bool:
    """Whether a mark is what it was; -1 goes with any version."""
    return kept[0] is now[0] and now[1] in (kept[1], -1)


def _four(x: torch.Tensor, dims: int) -> torch.Tensor:
    """x with leading axes of 1 up to `dims` axes."""
    return x[(None,) * (dims - x.dim())]


def _dense(counts: Any, indices: Any, rows: int, cols: int) -> torch.Tensor:
    """[batch, heads, rows, cols] bool from the first counts[..] of indices[..]; what lies beyond is cut off."""
    counts, indices = _four(counts, 3), _four(indices, 4)
    if counts.dim() != 3 or counts.shape[2] < rows:
        raise ValueError(f"block_mask must have {rows} blocks of queries, got shape {tuple(counts.shape)}")
    counts, indices = counts[:, :, :rows, None], indices[:, :, :rows].long()
    listed = torch.arange(indices.shape[3], device=indices.device) < counts
    listed = listed & (indices >= 0) & (indices < cols)
    seen = torch.zeros(*indices.shape[:3], cols + 1, dtype=torch.bool, device=indices.device)
    return seen.scatter_(3, indices.where(listed, cols), True)[..., :cols]


def _answers(mask_mod: Any, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """mask_mod, which takes single indices, for rows b, h, i [R] and their keys j [R, N]: bool [R, N]."""
    # private, but the one way to let a closure index a tensor by a vmapped index; create_block_mask does the same
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    along = torch.vmap(torch.vmap(mask_mod, in_dims=(None, None, None, 0)), in_dims=(0, 0, 0, 0))
    with torch.no_grad(), TransformGetItemToIndex():
        seen: torch.Tensor = along(b, h, i, j)
    return seen.to(torch.bool)


def _packed(seen: torch.Tensor) -> torch.Tensor:
    """Bits of [R, N] bools: [R, ceil(N / 32)] int32, bit j % 32 of word j // 32 for column j."""
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[1] % 32))
    worth = torch.tensor([*(1 << n for n in range(31)), -(1 << 31)], dtype=torch.int32, device=seen.device)
    words: torch.Tensor = (seen.view(seen.shape[0], -1, 32) * worth).sum(-1, dtype=torch.int32)
    return words


def _ordered(kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of each row by kind (0 whole, 1 in part, 2 not visible), ascending within one, and counts [.., 2]."""
    order = kind.contiguous().argsort(dim=-1, stable=True).to(torch.int32)  # dense, as kernels walk it
    return order, torch.stack([(kind == n).sum(-1, dtype=torch.int32) for n in (0, 1)], -1)


def _build(block_mask: "BlockMask", seqlen_q: int, seqlen_k: int) -> Blocks:
    """The Blocks of a BlockMask for these lengths."""
    block_q, block_k = sizes_of(block_mask, seqlen_q, seqlen_k)
    rows, cols = -(-seqlen_q // block_q), -(-seqlen_k // block_k)
    counts, indices, whole_counts, whole_indices = _lists(block_mask)
    partial = _dense(counts, indices, rows, cols)
    whole = torch.zeros_like(partial)
    if whole_counts is not None:
        whole = _dense(whole_counts, whole_indices, rows, cols)
    # kernels load whole blocks without a mask: those that overrun the lengths are asked for bits
    overrun = torch.zeros_like(whole)
    overrun[:, :, seqlen_q // block_q :] = True
    overrun[:, :, :, seqlen_k // block_k :] = True
    asked = partial | (whole & overrun)
    at = asked.nonzero()
    bits, some, every = _bits(block_mask.mask_mod, at, whole[asked], (block_q, block_k), (seqlen_q, seqlen_k))
    used = some & ~every
    state = torch.full(whole.shape, HIDDEN, dtype=torch.int32, device=whole.device).masked_fill_(whole, WHOLE)
    number = used.cumsum(0) - 1
    state[asked] = number.masked_fill(~some, HIDDEN).masked_fill(every, WHOLE).to(torch.int32)
    kind = (state != WHOLE).to(torch.int8) + (state == HIDDEN).to(torch.int8)
    return Blocks(state, bits[used], *_ordered(kind), *_ordered(kind.mT))


def _bits(
    mask_mod: Any, at: torch.Tensor, whole: torch.Tensor, sizes: tuple[int, int], lengths: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits of blocks `at` [P, 4], and of each whether it has some visible pair [P], and nothing else [P].

    Blocks are asked row by row, so that one larger than PAIRS costs no more memory; `whole` ones see all in reach.
    """
    block_q, block_k = sizes
    seqlen_q, seqlen_k = lengths
    total, device = at.shape[0] * block_q, at.device
    bits = torch.empty(total, -(-block_k // 32), dtype=torch.int32, device=device)
    some, every = (torch.empty(total, dtype=torch.bool, device=device) for _ in range(2))
    keys = torch.arange(block_k, device=device)
    step = max(1, PAIRS // block_k)
    for start in range(0, total, step):
        row = torch.arange(start, min(start + step, total), device=device)
        block = row // block_q
        b, h, i, j = at[block].unbind(1)
        i, j = i * block_q + row % block_q, j[:, None] * block_k + keys
        inside = (i < seqlen_q)[:, None] & (j < seqlen_k)
        seen = _answers(mask_mod, b, h, i.clamp(max=seqlen_q - 1), j.clamp(max=seqlen_k - 1))
        seen = (seen | whole[block, None]) & inside
        chunk = slice(start, start + step)
        bits[chunk], some[chunk], every[chunk] = _packed(seen), seen.any(1), seen.all(1)
    shape = (at.shape[0], block_q)
    return bits.view(*shape, bits.shape[1]), some.view(shape).any(1), every.view(shape).all(1)
