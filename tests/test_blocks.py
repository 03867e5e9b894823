"""BlockMask as bits: the blocks say of every pair what the BlockMask says, and lists hold the blocks that count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, noop_mask

from flash import blocks as module
from flash.blocks import blocks_of, sizes_of
from flash.kernels.spec import Blocks

BATCH, HEADS = 2, 3
SIZES: list[Any] = [16, 32, 64, 128, (32, 64), (64, 16)]
IDS = torch.tensor([[0] * 40 + [1] * 3 + [2] * 97 + [3] * 60, [7] * 120 + [5] * 80])
RANDOM = torch.rand(BATCH, HEADS, 200, 200, generator=torch.Generator().manual_seed(1)) < 0.01

MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: i >= j,
    "document": lambda b, h, i, j: IDS[b, i] == IDS[b, j],
    "random": lambda b, h, i, j: RANDOM[b, h, i, j],
    "window of a head": lambda b, h, i, j: (i - j).abs() <= 8 * (h + 1),
    "everything": lambda b, h, i, j: i >= 0,
    "nothing": lambda b, h, i, j: i < 0,
    "no look at all": noop_mask,
}


def dense(blocks: Blocks, sizes: tuple[int, int], seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """What the blocks make visible: bool [batch or 1, heads or 1, seqlen_q, seqlen_k]."""
    (size_q, size_k), state = sizes, blocks.state
    words = torch.stack([blocks.bits >> n & 1 for n in range(32)], -1).flatten(2)[:, :, :size_k].bool()
    words = torch.cat([words, torch.zeros(1, size_q, size_k, dtype=torch.bool)])
    seen = words[state.where(state >= 0, len(words) - 1)] | (state == module.WHOLE)[..., None, None]
    seen = seen.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    assert not seen[:, :, seqlen_q:].any() and not seen[:, :, :, seqlen_k:].any()
    return seen[:, :, :seqlen_q, :seqlen_k]


def check(blocks: Blocks, sizes: tuple[int, int], want: torch.Tensor) -> None:
    """Hold blocks to a dense mask: every pair, the order and length of every list, and no whole block that overruns."""
    seqlen_q, seqlen_k = want.shape[2:]
    assert torch.equal(dense(blocks, sizes, seqlen_q, seqlen_k), want)
    padded = torch.nn.functional.pad(want, (0, -seqlen_k % sizes[1], 0, -seqlen_q % sizes[0]))
    tiles = padded.unflatten(3, (-1, sizes[1])).unflatten(2, (-1, sizes[0]))
    some, every = (f(f(tiles, dim=5), dim=3) for f in (torch.any, torch.all))
    assert blocks.state.shape == some.shape and all(x.dtype == torch.int32 and x.is_contiguous() for x in blocks)
    assert not (blocks.state == module.WHOLE)[~every].any()  # none runs past the lengths
    used = blocks.state[blocks.state >= 0]
    assert used.sort().values.tolist() == list(range(len(blocks.bits)))
    assert blocks.bits.shape[1:] == (sizes[0], -(-sizes[1] // 32))
    for listed, counts, state in (
        (blocks.keys, blocks.key_counts, blocks.state),
        (blocks.queries, blocks.query_counts, blocks.state.mT),
    ):
        assert listed.shape == state.shape and counts.shape == (*state.shape[:3], 2)
        for at in torch.cartesian_prod(*map(torch.arange, state.shape[:3])).tolist():
            row = state[tuple(at)].tolist()
            whole = [n for n, kind in enumerate(row) if kind == module.WHOLE]
            part = [n for n, kind in enumerate(row) if kind >= 0]
            assert counts[tuple(at)].tolist() == [len(whole), len(part)]
            assert listed[tuple(at)].tolist()[: len(whole) + len(part)] == whole + part
            assert 0 <= min(listed[tuple(at)].tolist()) and max(listed[tuple(at)].tolist()) < len(row)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", [(200, 200), (150, 37), (64, 128), (1, 200)])
def test_every_pair_is_as_the_block_mask_says(name: str, size: Any, lengths: tuple[int, int]) -> None:
    for separate in (True, False):
        mask = create_block_mask(
            MASKS[name], BATCH, HEADS, *lengths, device="cpu", BLOCK_SIZE=size, separate_full_blocks=separate
        )
        grid = torch.meshgrid(*(torch.arange(n) for n in (BATCH, HEADS, *lengths)), indexing="ij")
        want = MASKS[name](*grid).expand(BATCH, HEADS, *lengths).bool()
        check(blocks_of(mask, BATCH, HEADS, *lengths), sizes_of(mask, *lengths), want)


@pytest.mark.parametrize("batch, heads", [(None, None), (BATCH, None), (None, HEADS), (BATCH, HEADS)])
def test_axes_stay_as_the_block_mask_has_them(batch: int | None, heads: int | None) -> None:
    mask = create_block_mask(lambda b, h, i, j: i >= j + 3 * b - h, batch, heads, 100, 90, device="cpu", BLOCK_SIZE=32)
    b, h = torch.arange(batch or 1).view(-1, 1, 1, 1), torch.arange(heads or 1).view(-1, 1, 1)
    want = torch.arange(100)[:, None] >= torch.arange(90) + 3 * b - h
    check(blocks_of(mask, BATCH, HEADS, 100, 90), (32, 32), want)


def by_hand(partial: list[list[int]], whole: list[list[int]] | None, **options: Any) -> BlockMask:
    """A BlockMask from the key blocks of each query block; unused places hold nonsense, as they may."""

    def lists(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.tensor([[[len(row) for row in rows]]], dtype=torch.int32)
        # in range, since torch itself transposes them
        places = [row + [0] * (5 - len(row)) for row in rows]
        return counts, torch.tensor([[places]], dtype=torch.int32)

    more = lists(whole) if whole is not None else (None, None)
    return BlockMask.from_kv_blocks(*lists(partial), *more, BLOCK_SIZE=16, **options)


def test_lists_made_by_hand_need_not_be_sorted_nor_agree_with_the_rule() -> None:
    # whole blocks are visible whole whatever the rule says, and the last ones end with the lengths
    mask = by_hand([[4, 0], [], [3, 2, 1], [1]], [[2, 1], [4], [], [1]], mask_mod=MASKS["causal"], seq_lengths=(60, 77))
    seen = torch.zeros(60, 77, dtype=torch.bool)
    causal = torch.arange(60)[:, None] >= torch.arange(77)
    for row, col in ((0, 4), (0, 0), (2, 3), (2, 2), (2, 1), (3, 1)):
        block = slice(16 * row, 16 * row + 16), slice(16 * col, 16 * col + 16)
        seen[block] = causal[block]
    for row, col in ((0, 2), (0, 1), (1, 4), (3, 1)):
        seen[16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = True
    found = blocks_of(mask, BATCH, HEADS, 60, 77)
    check(found, (16, 16), seen[None, None])
    assert found.state[0, 0, 1, 4] >= 0 and found.state[0, 0, 3, 1] >= 0  # they overrun
    assert found.state[0, 0, 0, 4] == module.HIDDEN  # causal hides all of it


def test_only_partial_blocks_without_lists_of_whole_ones() -> None:
    mask = by_hand([[0], [0, 1], [2]], None, mask_mod=MASKS["causal"], seq_lengths=(48, 80))
    want = torch.zeros(48, 80, dtype=torch.bool)
    want[:32, :32] = torch.ones(32, 32).tril()
    want[32:48, 32:48] = torch.ones(16, 16).tril()
    found = blocks_of(mask, 1, 1, 48, 80)
    check(found, (16, 16), want[None, None])
    assert found.state[0, 0, 1, 0] == module.WHOLE  # all of it was visible


def test_axes_that_were_indexed_away_are_one() -> None:
    mask = create_block_mask(MASKS["causal"], 1, HEADS, 100, 100, device="cpu", BLOCK_SIZE=32)
    batch, head = mask[0], mask[0, 1]
    batch.mask_mod = head.mask_mod = mask.mask_mod  # torch drops it
    assert torch.equal(blocks_of(batch, BATCH, HEADS, 100, 100).state, blocks_of(mask, BATCH, HEADS, 100, 100).state)
    assert blocks_of(head, BATCH, HEADS, 100, 100).state.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("lengths", [(0, 40), (40, 0), (0, 0)])
def test_no_queries_or_no_keys(lengths: tuple[int, int]) -> None:
    shape = [-(-n // 16) for n in lengths]
    indices = torch.zeros(1, 1, *shape, dtype=torch.int32)
    counts = torch.full((1, 1, shape[0]), shape[1], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, seq_lengths=lengths, compute_q_blocks=False)
    found = blocks_of(mask, 1, 1, *lengths)
    assert found.state.shape == (1, 1, *shape) and found.bits.shape == (0, 16, 1)
    assert found.key_counts.shape == (1, 1, shape[0], 2) and found.query_counts.sum() == 0


def test_one_block_larger_than_the_sequence_is_cut_to_it() -> None:
    mask = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32), BLOCK_SIZE=2**30
    )
    assert sizes_of(mask, 200, 70) == (256, 128)
    check(blocks_of(mask, 1, 1, 200, 70), (256, 128), torch.ones(1, 1, 200, 70, dtype=torch.bool))


@pytest.mark.parametrize("pairs", [1, 100, 4096])
def test_rows_are_asked_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(module, "PAIRS", pairs)
    asked = []
    answers = module._answers
    monkeypatch.setattr(module, "_answers", lambda *args: asked.append(args[4].numel()) or answers(*args))
    mask = create_block_mask(MASKS["causal"], None, None, 70, 70, device="cpu", BLOCK_SIZE=32)
    check(blocks_of(mask, 1, 1, 70, 70), (32, 32), torch.ones(70, 70, dtype=torch.bool).tril()[None, None])
    # the three blocks on the diagonal, and the two whole ones that overrun
    assert sum(asked) == 5 * 32 * 32 and max(asked) <= max(pairs, 32)


def test_the_closure_is_asked_once_and_again_where_something_changed() -> None:
    asked = []

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        asked.append(1)
        return i >= j

    mask = create_block_mask(rule, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    asked.clear()
    first = blocks_of(mask, 1, 1, 64, 64)
    assert len(asked) == 1 and blocks_of(mask, 5, 7, 64, 64) is first and len(asked) == 1
    assert blocks_of(mask, 1, 1, 60, 64).state.shape == (1, 1, 2, 2) and len(asked) == 2  # other lengths
    assert blocks_of(mask, 1, 1, 64, 64) is first and len(asked) == 2
    mask.mask_mod = MASKS["everything"]
    assert not torch.equal(blocks_of(mask, 1, 1, 64, 64).state, first.state) and len(asked) == 2
    mask.mask_mod = rule
    mask.full_kv_num_blocks.zero_()
    assert (blocks_of(mask, 1, 1, 64, 64).state == module.WHOLE).sum() == 0 and len(asked) == 3


def test_a_block_mask_moved_elsewhere_is_another() -> None:
    mask = create_block_mask(MASKS["causal"], None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    first = blocks_of(mask, 1, 1, 64, 64)
    moved = mask.to("cpu")
    again = blocks_of(moved, 1, 1, 64, 64)
    assert again is not first and torch.equal(again.state, first.state)


def test_block_masks_that_do_not_cover_a_call_are_named() -> None:
    mask = create_block_mask(MASKS["causal"], BATCH, HEADS, 64, 64, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match=r"batch 1 or 5 and heads 1 or 3, got \(2, 3\)"):
        blocks_of(mask, 5, HEADS, 64, 64)
    with pytest.raises(ValueError, match=r"batch 1 or 2 and heads 1 or 4, got \(2, 3\)"):
        blocks_of(mask, BATCH, 4, 64, 64)
    with pytest.raises(ValueError, match="must have 3 blocks of queries, got shape"):
        blocks_of(mask, BATCH, HEADS, 96, 64)


def test_memory_is_that_of_the_blocks_and_their_bits() -> None:
    n, size = 8192, 128
    rows = n // size
    counts = torch.ones(1, 1, rows, dtype=torch.int32)
    diagonal = torch.arange(rows, dtype=torch.int32).view(1, 1, rows, 1)
    mask = BlockMask.from_kv_blocks(
        counts, diagonal, BLOCK_SIZE=size, mask_mod=MASKS["causal"], seq_lengths=(n, n), compute_q_blocks=False
    )
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(out):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        found = blocks_of(mask, 1, 1, n, n)
    assert found.bits.shape == (rows, size, size // 32) and found.state.shape == (1, 1, rows, rows)
    assert largest <= 8 * module.PAIRS < n * n


def test_compiled_code_reads_a_block_mask_that_it_met_before() -> None:
    mask = create_block_mask(MASKS["causal"], None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    want = blocks_of(mask, 1, 1, 64, 64)
    found = torch.compile(lambda: blocks_of(mask, 1, 1, 64, 64).bits + 1, backend="aot_eager", fullgraph=True)()
    assert torch.equal(found, want.bits + 1)


def test_a_block_mask_met_in_inference_mode_does_for_training() -> None:
    from flash.attention import flash_attention

    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, device="cpu")
    q = torch.randn(1, 2, 64, 16)
    with torch.inference_mode():
        flash_attention(q, q, q, block_mask=block_mask)
    q.requires_grad_()
    flash_attention(q, q, q, block_mask=block_mask).sum().backward()  # type: ignore[union-attr]
    assert q.grad is not None
