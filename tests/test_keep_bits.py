"""What dropout drew stays for the backward pass as bits, within its room, and no longer than the graph."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from flash import keep_bits, scoring, tiling
from flash.attention import flash_attention, flash_attention_varlen


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each draw decided."""
    found: list[int] = []

    def kept(*args: Any) -> torch.Tensor:
        keep = kept_before(*args)
        found.append(keep.numel())
        return keep

    kept_before = scoring.kept
    monkeypatch.setattr(scoring, "kept", kept)
    gc.collect()  # what other tests left in a circle
    assert not keep_bits.held
    yield found
    gc.collect()
    assert not keep_bits.held  # whatever a test did, nothing is left of it


def inputs(batch: int = 2, heads: int = 3, seqlen: int = 100, head_dim: int = 16) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, seqlen, head_dim, requires_grad=True) for _ in range(3)]


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)
    o = flash_attention(q, k, v, dropout_p=0.3, backend="torch", **keywords)
    assert isinstance(o, torch.Tensor)
    return [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]


def bytes_held() -> int:
    found = [kept for of_seed in keep_bits.held.values() for kept in of_seed.values()]
    return sum(len(bits) for kept in found for bits in kept.bits.values())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 2**31))
def test_bits_come_back(shape: list[int], seed: int) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = keep_bits.packed(keep)
    assert bits.dtype == torch.uint8 and len(bits) == -(-keep.numel() // 8)
    assert torch.equal(keep_bits.unpacked(bits, tuple(shape)), keep)


@pytest.mark.parametrize(
    "keywords", [{}, {"causal": True}, {"window": 20}, {"mask": torch.arange(100) < 70}], ids=lambda x: "-".join(x)
)
def test_a_backward_draws_nothing_and_is_the_same(
    draws: list[int], monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]
) -> None:
    monkeypatch.setattr(tiling, "TILE_BYTES", 4 * 100 * 20)  # more tiles than one
    monkeypatch.setattr(tiling, "NARROW_BYTES", 4 * 100 * 20)
    x = inputs()
    found = gradients(*x, **keywords)
    once = len(draws)
    assert once > 2
    monkeypatch.setattr(scoring, "recalled", lambda *args: args[-1]())
    for got, want in zip(found, gradients(*x, **keywords), strict=True):
        assert torch.equal(got, want)
    assert len(draws) == 3 * once


def test_bits_take_no_more_bytes_than_the_tensors_that_stay_anyway(
    draws: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "TILE_BYTES", 4 * 400 * 160)
    q, k, v = inputs(seqlen=400, head_dim=2)
    o = flash_attention(q, k, v, dropout_p=0.3, backend="torch")
    assert isinstance(o, torch.Tensor)
    limit, pairs, stayed = q.nbytes + k.nbytes + v.nbytes + o.nbytes, 2 * 3 * 400 * 400, bytes_held()
    assert 0.8 * limit < stayed <= limit < pairs / 8
    assert sum(draws) == pairs
    o.sum().backward()
    assert sum(draws) == 2 * pairs - 8 * stayed  # what did not fit is drawn again
    del o


def test_bits_go_with_the_graph(draws: list[int]) -> None:
    x = inputs()
    o = flash_attention(*x, dropout_p=0.3, backend="torch")
    assert isinstance(o, torch.Tensor) and bytes_held() == 2 * 3 * 100 * 100 // 8
    o.sum().backward(retain_graph=True)
    o.sum().backward()
    assert draws == [3 * 100 * 100] * 2 and not keep_bits.held
    with torch.no_grad():
        flash_attention(*x, dropout_p=0.3, backend="torch")
    assert not keep_bits.held


def test_bits_serve_packed_sequences_and_compiled_calls(draws: list[int]) -> None:
    x = [torch.randn(60, 3, 16, requires_grad=True) for _ in range(3)]
    starts = torch.tensor([0, 25, 25, 60], dtype=torch.int32)
    options: dict[str, Any] = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=35, max_seqlen_k=35)
    o = flash_attention_varlen(*x, **options, dropout_p=0.3, backend="torch")
    assert isinstance(o, torch.Tensor)
    o.sum().backward()
    assert draws == [3 * 25 * 25, 3 * 35 * 35]
    del o
    compiled = torch.compile(lambda *x: flash_attention(*x, dropout_p=0.3, backend="torch"), backend="aot_eager")
    compiled(*inputs()).sum().backward()
    assert draws[2:] == [3 * 100 * 100] * 2


def test_a_checkpointed_call_keeps_no_bits(draws: list[int]) -> None:
    x = inputs()
    o = checkpoint(lambda *x: flash_attention(*x, dropout_p=0.3, backend="torch"), *x, use_reentrant=False)
    assert not keep_bits.held
    found = torch.autograd.grad(o.square().sum(), x, retain_graph=False)
    assert len(draws) == 4 and all(bool(torch.isfinite(gradient).all()) for gradient in found)
    del o


def test_a_tangent_draws_nothing_and_is_the_same(draws: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, (k, v) = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 2, 30, 8)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o = flash_attention(q, k, v, dropout_p=0.3, backend="torch")
        assert isinstance(o, torch.Tensor)
        return o

    def tangents() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return list(torch.func.jvp(attend, (q, k, v), tuple(x.cos() for x in (q, k, v))))

    found = tangents()
    assert draws == [4 * 30 * 30] * 2
    monkeypatch.setattr(scoring, "recalled", lambda *args: args[-1]())
    for got, want in zip(found, tangents(), strict=True):
        assert torch.equal(got, want)
    assert draws == [4 * 30 * 30] * 6


def test_what_is_too_small_for_its_entry_is_drawn_again(draws: list[int]) -> None:
    x = [torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3)]
    o = flash_attention(*x, dropout_p=0.3, backend="torch")
    assert isinstance(o, torch.Tensor) and bytes_held() == 0
    o.sum().backward()
    assert draws == [25, 25]


def test_keys_with_gaps_are_drawn_again(draws: list[int]) -> None:
    blocks = create_block_mask(lambda b, h, i, j: (j // 16) % 2 == 0, None, None, 100, 100, "cpu", 16)
    o = flash_attention(*inputs(), dropout_p=0.3, block_mask=blocks, backend="torch")
    assert isinstance(o, torch.Tensor) and bytes_held() == 0
    once = len(draws)
    o.sum().backward()
    assert len(draws) == 2 * once
