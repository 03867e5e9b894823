"""Dropout: which weights are kept, that the backward pass keeps the same, and that nothing but the seed decides it."""

import math

import pytest
import torch

from flash.attention import flash_attention, flash_attention_varlen
from flash.kernels.spec import Config
from tests import features
from tests.bounds import check
from tests.calls import Place, random_inputs
from tests.features import Sizes
from tests.philox import keep_mask

pytestmark = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])


def kept(
    place: Place, backend: str, seqlen_q: int, seqlen_k: int, p: float, config: Config | None = None
) -> torch.Tensor:
    """Which weights a call of equal scores keeps, [2, 3, seqlen_q, seqlen_k]: v = 1 tells them apart."""
    q, k = place(torch.zeros(2, 3, seqlen_q, 4)), place(torch.zeros(2, 3, seqlen_k, 4))
    v = place(torch.eye(seqlen_k).expand(2, 3, seqlen_k, seqlen_k).contiguous())
    o = flash_attention(q, k, v, dropout_p=p, backend=backend, config=config or features.TILES)
    assert isinstance(o, torch.Tensor)
    assert torch.allclose(o[o > 0], torch.full_like(o[o > 0], 1 / (1 - p) / seqlen_k), rtol=1e-5)
    return (o > 0).cpu()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_is_kept_is_what_philox_says(place: Place, backend: str, p: float) -> None:
    for torch_seed in range(4):
        torch.manual_seed(torch_seed)
        seed = int(torch.randint(0, 2**63 - 1, (1,), device=place(torch.zeros(1)).device))
        torch.manual_seed(torch_seed)
        got = kept(place, backend, 35, 41, p)
        assert torch.equal(got, keep_mask(seed, p, 2, 3, 35, 41))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.75])
def test_the_rate_is_p(place: Place, backend: str, p: float) -> None:
    found = torch.cat([(~kept(place, backend, 60, 60, p)).flatten() for _ in range(3)])
    sigma = math.sqrt(p * (1 - p) / found.numel())
    assert abs(found.double().mean().item() - p) < 3 * sigma


def test_each_head_batch_element_row_and_column_differs(place: Place, backend: str) -> None:
    found = kept(place, backend, 40, 40, 0.5)
    for axis in range(4):
        first, *others = found.unbind(axis)
        assert not any(torch.equal(first, other) for other in others)


def test_the_mask_changes_from_call_to_call_and_repeats_under_manual_seed(place: Place, backend: str) -> None:
    torch.manual_seed(3)
    first, second = (kept(place, backend, 30, 30, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(kept(place, backend, 30, 30, 0.5), first)
    assert torch.equal(kept(place, backend, 30, 30, 0.5), second)


def test_no_draw_is_made_without_dropout(place: Place, backend: str) -> None:
    x = random_inputs(place, seqlen_q=9)
    state = torch.get_rng_state()
    flash_attention(x.q, x.k, x.v, backend=backend, config=features.TILES)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_tiles_do_not_change_the_mask(place: Place, backend: str, block_m: int, block_n: int) -> None:
    torch.manual_seed(7)
    want = kept(place, "torch", 70, 50, 0.4)
    torch.manual_seed(7)
    assert torch.equal(kept(place, backend, 70, 50, 0.4, Config(block_m, block_n, 4, 1)), want)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("names", [[], ["causal", "groups"], ["sinks", "bias"], ["window", "score_mod"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_same_mask(place: Place, backend: str, names: list[str], dtype: torch.dtype) -> None:
    sizes = Sizes(batch=1, seqlen_q=50, seqlen_k=61, head_dim=16, head_dim_v=24)
    x = features.call_of(place, ["dropout_p", *names], sizes, dtype)
    check(features.run(x, backend), features.known(x))


@pytest.mark.parametrize("p", [1e-9, 0.01, 0.99, 1 - 2**-20])
def test_any_probability(place: Place, backend: str, p: float) -> None:
    x = features.call_of(place, [])
    x.options["dropout_p"] = p
    check(features.run(x, backend), features.known(x))


def test_the_normaliser_is_that_of_all_weights(place: Place, backend: str) -> None:
    x = features.call_of(place, ["causal"])
    plain = features.run(x, backend)
    x.options["dropout_p"] = 0.5
    assert torch.allclose(features.run(x, backend).lse, plain.lse, rtol=1e-14)


def test_a_packed_sequence_is_dropped_as_a_batch_element(place: Place, backend: str) -> None:
    lengths = ((20, 17), (0, 5), (9, 33))
    x = features.call_of(place, ["packed", "dropout_p"], Sizes(lengths=lengths))
    starts = {side: x.options[f"cu_seqlens_{side}"] for side in "qk"}
    eye = torch.cat([torch.eye(33, dtype=torch.float64)[:n] for _, n in lengths])
    v = place(eye[:, None].expand(-1, 2, -1).contiguous())
    q, k = torch.zeros_like(x.q), torch.zeros_like(x.k)
    torch.manual_seed(features.SEED)
    o = flash_attention_varlen(q, k, v, backend=backend, config=features.TILES, **x.options)
    assert isinstance(o, torch.Tensor)
    want = keep_mask(features.seed_of(x), 0.3, 3, 2, 20, 33)
    for b, (n, m) in enumerate(lengths):
        begin = int(starts["q"][b])
        assert torch.equal((o[begin : begin + n, :, :m] > 0).transpose(0, 1).cpu(), want[b, :, :n, :m])
