"""Copies of a cache's keys: every number of float8, every way that positions lie in pages, and how large they are."""

from typing import Any

import pytest
import torch

from flash import copied, flash_attention_decode, gathered
from flash.copied import Buffer, Places, copy
from tests import decode_cases
from tests.test_decode_call import ALL, by_torch
from tests.test_footprint import allocated

HEADS, WIDTH = 3, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nans", [False, True])
def test_every_number_of_float8_is_what_torch_says(dtype: torch.dtype, nans: bool) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    x = numbers[(numbers & 0x7F != 0x7F) | nans].view(torch.float8_e4m3fn)
    into = torch.empty(x.shape, dtype=dtype)
    copied.widen(x, into)
    assert torch.equal(into.nan_to_num(1e9), x.to(dtype).nan_to_num(1e9))
    assert torch.equal(into.signbit()[x.to(dtype) == 0], torch.tensor([False, True]))


@pytest.mark.parametrize("piece", [1, 3 * WIDTH, 2**18])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("size", "start", "stop"),
    [(1, 0, 6), (1, 2, 3), (4, 0, 4), (4, 1, 3), (4, 2, 13), (4, 8, 8), (300, 0, 300), (300, 299, 601), (300, 7, 8)],
)
def test_a_copy_is_what_each_position_holds(
    monkeypatch: pytest.MonkeyPatch, size: int, start: int, stop: int, stored: torch.dtype, piece: int
) -> None:
    assert copied.SMALL in range(4, 300)
    monkeypatch.setattr(copied, "PIECE", piece)
    pages = torch.randperm(9)[: -(-stop // size) - start // size if stop > start else 0]
    x = torch.randn(9, HEADS, size, WIDTH).to(stored)
    places = Places(pages.tolist(), slice(start % size, start % size + stop - start), pages)
    factor, buffer = torch.tensor([0.5, 3.0, -1.0]), Buffer(torch.empty(0))
    positions = range(start % size, start % size + stop - start)
    for heads, factors in ((slice(0, 3), None), (slice(1, 3), factor), (slice(2, 3), torch.tensor([2.0]))):
        want = torch.stack([x[pages[p // size], heads, p % size].float() for p in positions], 1) if positions else None
        found = copy(x, heads, places, factors, buffer)
        if want is None:
            assert found.shape == (1, heads.stop - heads.start, 0, WIDTH)
            continue
        if factors is not None:
            want *= (factors[heads] if len(factors) > 1 else factors)[:, None, None]
        assert torch.equal(found[0], want)


@pytest.mark.parametrize(
    "names", [ALL, ("pages of 3",), ("float8", "sinks"), ("alibi_slopes", "pages of 1", "v_scale")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_in_turn_say_what_all_say_at_once(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    x = decode_cases.case(*names, dtype=dtype)
    want = x.run(flash_attention_decode, **by_torch)
    monkeypatch.setattr(gathered, "COPIED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    calls: list[Any] = []
    monkeypatch.setattr(gathered, "copy", lambda *args: calls.append(args[1]) or copy(*args))
    got = x.run(flash_attention_decode, **by_torch)
    assert {(heads.start, heads.stop) for heads in calls} == {(0, 1), (1, 2)}
    torch.testing.assert_close(got.o, want.o, equal_nan=True)
    torch.testing.assert_close(got.lse, want.lse, equal_nan=True)


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_a_copy_takes_no_more_for_more_sequences_or_heads(monkeypatch: pytest.MonkeyPatch, stored: torch.dtype) -> None:
    """Keys and values of as many heads as there are threads, or COPIED of each; and what is widened at once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    keys, size, width = 4096, 16, 64
    one_head = 2 * keys * width * 4

    def taken(batch: int, heads: int) -> int:
        k, v = (torch.randn(keys // size, heads, size, width).to(stored) for _ in range(2))
        table = torch.arange(keys // size, dtype=torch.int32).repeat(batch, 1)
        lengths = torch.full((batch,), keys, dtype=torch.int32)
        q = torch.randn(batch, heads, 1, width)
        options: dict[str, Any] = dict(cache_seqlens=lengths, block_table=table, **by_torch)
        return allocated(lambda: (flash_attention_decode(q, k, v, **options),))

    monkeypatch.setattr(gathered, "COPIED", 1)
    assert one_head < taken(1, 1) < one_head + 8 * copied.PIECE
    assert taken(2, 8) < taken(1, 1) + 2**18
    monkeypatch.setattr(gathered, "COPIED", 4 * keys * width * 4)
    assert 4 * one_head < taken(1, 8) < 4 * one_head + 8 * copied.PIECE


def test_of_large_pages_a_window_is_copied_alone() -> None:
    size = 2**14
    k, v = (torch.randn(3, 1, size, WIDTH) for _ in range(2))
    options: dict[str, Any] = dict(cache_seqlens=decode_cases.numbers(size + 3), window=(7, 0), **by_torch)
    table = decode_cases.numbers(2, 0)[None]
    q = torch.randn(1, 1, 1, WIDTH)
    assert allocated(lambda: (flash_attention_decode(q, k, v, block_table=table, **options),)) < k[0].nbytes / 8
