"""Which backend decodes, with which tiles, and in how many parts: found without asking the device anything."""

from typing import Any

import pytest
import torch

from flash import Config, dispatch_step, flash_attention_decode
from flash.autotune import decoding
from flash.kernels.spec import LIMITS
from flash.step import Step
from tests.decode_cases import draw, numbers, step_of

HEADS, HEADS_K, HEAD_DIM = 4, 2, 16


def step(batch: int = 2, rows: int = 1, capacity: int = 4096, page: int | None = None, **options: Any) -> Step:
    """A call with a cache of a capacity."""
    slots = (batch, capacity) if page is None else (7, page)
    cache = torch.zeros(1, 1, 1, 1).expand(slots[0], HEADS_K, slots[1], HEAD_DIM)
    if page is not None:
        options["block_table"] = numbers(0).expand(batch, capacity // page)
    q, lengths = torch.zeros(batch, HEADS, rows, HEAD_DIM), numbers(*[0] * batch)
    return step_of(q, cache, cache, cache_seqlens=lengths, **options)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> int:
    """The multiprocessors of a GPU that is not here."""
    monkeypatch.setattr(dispatch_step, "multiprocessors", lambda device: 100)
    return 100


def splits(call: Step) -> int:
    """Parts of equal sizes."""
    found, keys = dispatch_step.parts_of(call, Config(16, 32))
    assert keys == 0
    return found


def test_parts_fill_the_gpu_whatever_the_lengths(processors: int) -> None:
    assert splits(step(1)) == decoding.splits_of(4096, 1, HEADS_K, 1, processors, 32) > 1
    assert splits(step(1)) == splits(step(1, page=16)) >= splits(step(8)) >= splits(step(100)) == 1
    assert splits(step(1, capacity=100)) == 1
    many_rows = step(1, rows=50)  # of two heads: seven tiles of rows
    assert splits(many_rows) == decoding.splits_of(4096, 1, HEADS_K, 7, processors, 32)


def test_batch_invariant_parts_have_a_size_of_their_own(processors: int) -> None:
    for batch in (1, 64):
        for capacity, count in ((4096, 4), (4097, 5), (100, 1), (0, 1)):
            found = dispatch_step.parts_of(step(batch, capacity=capacity, batch_invariant=True), Config(16, 32))
            assert found == (count, decoding.INVARIANT) == (count, 1024)
    many_rows = step(1, rows=80, batch_invariant=True)  # of two heads: ten tiles of rows
    assert dispatch_step.parts_of(many_rows, Config(16, 32)) == (1, 16 * 1024)
    assert all(decoding.INVARIANT % block_n == 0 for block_n in LIMITS["decode"]["block_n"])


def test_parts_asked_for_are_taken_unless_all_would_be_empty(processors: int) -> None:
    assert splits(step(64, num_splits=5)) == splits(step(1, num_splits=5, batch_invariant=True)) == 5
    assert splits(step(1, num_splits=10**9)) == 4096 // 32
    assert splits(step(1, num_splits=1)) == 1
    # what is merged in a wide table is merged in a narrow one, where there is but one part
    assert splits(step(1, capacity=0, num_splits=3)) == splits(step(1, capacity=9, num_splits=3)) == 2


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"num_splits": 3}], ids=str)
def test_a_row_has_the_same_bits_whatever_is_beside_it(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_step, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(decoding, "INVARIANT", 32)
    lengths, capacity = (70, 3, 0, 40), 128
    q = draw(4, HEADS, 1, HEAD_DIM, dtype=torch.float32).to(device)
    k, v = (draw(4, HEADS_K, capacity, HEAD_DIM, dtype=torch.float32).to(device) for _ in range(2))
    seqlens, sinks = numbers(*lengths).to(device), torch.randn(HEADS, device=device)
    options |= {"backend": "triton", "return_lse": True, "sinks": sinks}
    every = flash_attention_decode(q, k, v, cache_seqlens=seqlens, **options)
    for b, length in enumerate(lengths):
        own, keys = slice(b, b + 1), slice(0, max(length, 1))  # no longer than it must be
        alone = flash_attention_decode(q[own], k[own, :, keys], v[own, :, keys], cache_seqlens=seqlens[own], **options)
        assert all(torch.equal(x[own], y) for x, y in zip(every, alone, strict=True)), b


def test_tiles_are_the_formulas_unless_the_caller_brings_some() -> None:
    assert dispatch_step.tuned(step(config=Config(32, 64))) == (Config(32, 64), "given by the caller")
    want = decoding.for_decode("interpreter", "float32", HEAD_DIM, 2, 4, False)
    assert dispatch_step.tuned(step()) == want


def test_cpu_tensors_are_torchs_unless_another_is_asked_for() -> None:
    call = step()
    assert dispatch_step.chosen("auto", call.q.device, call.q.dtype, call.cache) == "torch"
    with pytest.raises(NotImplementedError, match="'hopper' does not decode float32 .*use backend='auto'.*'torch'"):
        dispatch_step.chosen("hopper", call.q.device, call.q.dtype, call.cache)


@pytest.mark.interpret(gpu=False)
def test_the_interpreter_decodes_where_it_is_asked_for() -> None:
    call = step()
    assert dispatch_step.chosen("triton", call.q.device, call.q.dtype, call.cache) == "triton"
