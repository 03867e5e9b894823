"""The tests' own Philox against the published vectors, and against Triton's and torch's."""

import importlib.util

import numpy as np
import pytest
import torch

from flash import philox as ours
from tests.philox import dropout_mask, keep_mask, philox

KNOWN = {  # Random123's kat_vectors, philox4x32 10: counter, key, output
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}
SEED = 0x299F31D0A4093822

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out, seed, b, h, SEQLEN_Q: tl.constexpr, SEQLEN_K: tl.constexpr):
        i, j = tl.arange(0, SEQLEN_Q)[:, None], tl.arange(0, SEQLEN_K)[None, :]
        words = tl.philox(tl.load(seed), j + 0 * i, i + 0 * j, h + 0 * (i + j), b + 0 * (i + j))
        tl.store(out + i * SEQLEN_K + j, words[0].to(tl.int64))


@pytest.mark.parametrize("name", KNOWN)
def test_published_vectors(name: str) -> None:
    counter, key, want = KNOWN[name]
    assert [int(word) for word in philox(tuple(counter), tuple(key))] == want


@pytest.mark.interpret
@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 2, 2**32 - 1])
def test_equals_tritons(device: torch.device, seed: int) -> None:
    out = torch.zeros(16, 32, dtype=torch.int64, device=device)
    draw[(1,)](out, torch.tensor([seed], device=device), 3, 5, SEQLEN_Q=16, SEQLEN_K=32)
    i, j = np.ogrid[:16, :32]
    want = philox((j, i, np.uint64(5), np.uint64(3)), (np.uint64(seed % 2**32), np.uint64(seed // 2**32)))[0]
    assert torch.equal(out.cpu(), torch.from_numpy(want.astype(np.int64)))


def test_each_axis_is_a_counter_word() -> None:
    kept = keep_mask(SEED, 0.5, 3, 4, 5, 6)
    first = philox((4, 3, 2, 1), (SEED % 2**32, SEED >> 32))[0]
    assert kept.shape == (3, 4, 5, 6) and bool(kept[1, 2, 3, 4]) == (int(first) >= 2**31)
    assert torch.equal(keep_mask(SEED, 0.5, 2, 3, 4, 5), kept[:2, :3, :4, :5])


def test_the_seed_may_be_a_tensor_and_both_halves_count() -> None:
    kept = keep_mask(SEED, 0.5, 1, 1, 8, 8)
    assert torch.equal(kept, keep_mask(torch.tensor([SEED]), 0.5, 1, 1, 8, 8))
    for other in (SEED ^ 1, SEED ^ 1 << 40):
        assert not torch.equal(kept, keep_mask(other, 0.5, 1, 1, 8, 8))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.99])
def test_rate_and_factors(dropout_p: float) -> None:
    factors = dropout_mask(SEED, dropout_p, 2, 4, 64, 64)
    assert factors.dtype == torch.float64 and set(factors.unique().tolist()) <= {0.0, 1 / (1 - dropout_p)}
    sigma = (dropout_p * (1 - dropout_p) / factors.numel()) ** 0.5
    assert abs(float((factors == 0).double().mean()) - dropout_p) <= 3 * sigma


@pytest.mark.parametrize("chunk", [1, 20, 100, 2**20])  # less than a row of a head, a row, a row of every head, all
@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 2])
def test_torchs_is_the_same_however_it_is_cut(monkeypatch: pytest.MonkeyPatch, chunk: int, seed: int) -> None:
    monkeypatch.setattr(ours, "CHUNK", chunk)
    h, i, j = torch.arange(2, 5)[:, None, None], torch.arange(3, 10)[None, :, None], torch.arange(4, 17)[None, None]
    kept = ours.kept(seed, 0.37, 2, h, i, j)
    assert torch.equal(kept, keep_mask(seed, 0.37, 3, 5, 10, 17)[2, 2:, 3:, 4:])
