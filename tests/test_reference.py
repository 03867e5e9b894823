"""The oracle against torch's own float64 attention, against numbers, and against the fixed meanings of the library."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash.reference import attention


def inputs(seqlen_q: int, seqlen_k: int, heads: int = 4, heads_k: int = 2, head_dim_v: int = 5) -> list[Tensor]:
    shapes = (heads, seqlen_q, 8), (heads_k, seqlen_k, 8), (heads_k, seqlen_k, head_dim_v)
    return [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (17, 17), (17, 63), (63, 17)])
def test_equals_sdpa_math(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    q, k, v = inputs(seqlen_q, seqlen_k)
    got = attention(q, k, v, causal=causal, q_offset=0, scale=0.3)  # sdpa's is_causal is top-left
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    do = torch.randn_like(want)
    for grad, grad_want in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (got, want)), strict=True):
        torch.testing.assert_close(grad, grad_want, rtol=0, atol=1e-13)


def test_two_keys_by_hand() -> None:
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
    o, lse = attention(q, k, k, scale=1.0, return_lse=True)
    e = torch.e
    torch.testing.assert_close(o.item(), e / (1 + e))
    torch.testing.assert_close(lse.exp().item(), 1 + e)


def test_default_scale_and_offset() -> None:
    q, k, v = inputs(3, 7)
    assert torch.equal(attention(q, k, v, causal=True), attention(q, k, v, causal=True, q_offset=4, scale=8**-0.5))


def test_q_offset_per_sequence() -> None:
    q, k, v = inputs(9, 9)
    got = attention(q, k, v, causal=True, q_offset=torch.tensor([3, -4], dtype=torch.int32))
    for b, q_offset in enumerate((3, torch.tensor(-4))):
        want = attention(*(x[b : b + 1] for x in (q, k, v)), causal=True, q_offset=q_offset)
        assert torch.equal(got[b : b + 1], want)


@pytest.mark.parametrize("q_offset", [0, 3, -2])
def test_gradcheck(q_offset: int) -> None:
    q, k, v = inputs(5, 4, heads=2, heads_k=1, head_dim_v=3)

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attention(*args, causal=True, q_offset=q_offset, return_lse=True)
        return o, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v), check_forward_ad=True)


def test_rows_without_keys_return_zero() -> None:
    q, k, v = inputs(6, 4)
    o, lse = attention(q, k, v, causal=True, q_offset=-2, return_lse=True)
    assert (o[:, :, :2] == 0).all() and (lse[:, :, :2] == float("-inf")).all()
    assert o[:, :, 2:].ne(0).all() and lse[:, :, 2:].isfinite().all()
    dq, dk, dv = torch.autograd.grad((o, lse), (q, k, v), (torch.ones_like(o), torch.ones_like(lse)))
    assert (dq[:, :, :2] == 0).all() and all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_zero_lengths(seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = inputs(seqlen_q, seqlen_k)
    o, lse = attention(q, k, v, return_lse=True)
    assert o.shape == (2, 4, seqlen_q, 5) and (o == 0).all()
    assert lse.shape == (2, 4, seqlen_q) and (lse == float("-inf")).all()
    assert all((x == 0).all() for x in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_only_what_sees_it(name: str) -> None:
    clean = dict(zip("qkv", inputs(7, 7), strict=True))
    dirty = {key: x.detach().clone() for key, x in clean.items()}
    dirty[name][:, :, 4] = float("nan")
    for x in dirty.values():
        x.requires_grad_()
    results = []
    for call in (clean, dirty):
        o = attention(*call.values(), causal=True)
        results.append((o, *torch.autograd.grad(o.sum(), list(call.values()))))
    seen = torch.arange(7) == 4 if name == "q" else torch.arange(7) >= 4
    for want, got in itertools.islice(zip(*results, strict=True), 2):  # o, dq: a row each
        assert got[:, :, seen].isnan().all()
        torch.testing.assert_close(got[:, :, ~seen], want[:, :, ~seen], rtol=0, atol=1e-13)
    if name == "q":
        assert all(x[:, :, 5:].isfinite().all() for x in results[1][2:])  # dk, dv of keys that row 4 does not see


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("q_offset", [0, -5])
def test_nan_in_do_reaches_only_what_its_row_sees(q_offset: int, bad: float) -> None:
    x = inputs(7, 7)
    o = attention(*x, causal=True, q_offset=q_offset)
    do = torch.randn_like(o)
    want = torch.autograd.grad(o, x, do, retain_graph=True)
    do[:, :, 4] = bad
    dq, dk, dv = torch.autograd.grad(o, x, do)
    others, unseen = torch.arange(7) != 4, slice(max(0, 5 + q_offset), 7)
    torch.testing.assert_close(dq[:, :, others], want[0][:, :, others], rtol=0, atol=1e-13)
    for grad, grad_want in zip((dk, dv), want[1:], strict=True):
        torch.testing.assert_close(grad[:, :, unseen], grad_want[:, :, unseen], rtol=0, atol=1e-13)
    assert not dv[:, :, : unseen.start].isfinite().any()


def test_partial_results_merge_by_lse() -> None:
    q, k, v = inputs(6, 11)
    want, lse_want = attention(q, k, v, return_lse=True)
    parts = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 4), slice(4, 11))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    o = sum(o_part * (lse_part - lse).exp().unsqueeze(-1) for o_part, lse_part in parts)
    torch.testing.assert_close(lse, lse_want, rtol=0, atol=1e-14)
    torch.testing.assert_close(o, want, rtol=0, atol=1e-14)


def test_dropout_mask_scales_weights_and_leaves_lse() -> None:
    q, k, v = inputs(4, 4)
    ones = torch.ones(4, 4, dtype=torch.float64)
    o, lse = attention(q, k, v, return_lse=True)
    doubled, lse_doubled = attention(q, k, v, return_lse=True, dropout_mask=2 * ones)
    torch.testing.assert_close(doubled, 2 * o)
    assert torch.equal(lse, lse_doubled)
    assert torch.equal(attention(q, k, v, dropout_mask=0 * ones), torch.zeros_like(o))


def test_low_precision_is_upcast_first() -> None:
    x = [t.detach().half() for t in inputs(5, 5)]
    assert torch.equal(attention(*x), attention(*(t.double() for t in x)))
