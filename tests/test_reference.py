"""The oracle against torch's own float64 attention, against numbers, and against the fixed meanings of the library."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flash.mods import MaskMod, ScoreMod, document, tanh_softcap
from flash.reference import attention, attention_varlen

INF = float("inf")


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


def equal(got: Any, want: Any, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, 4, 9, 7), enable_gqa=True)


POSITION, KEY = torch.arange(9)[:, None] - 2, torch.arange(7)[None, :]  # of 9 queries and 7 keys
DISTANCE = KEY - POSITION
SEEN = torch.rand(2, 4, 9, 7, generator=torch.Generator().manual_seed(1)) > 0.4
SEEN[..., 0] = True
LENGTHS = torch.arange(7) < torch.tensor([3, 7])[:, None]
APART = MaskMod(None, lambda b, h, i, j, args: j != i)
THIRDS = MaskMod(None, lambda b, h, i, j, args: (b + h + i + j) % args[0] > 0, (torch.tensor(3),))
SUMS = torch.arange(2)[:, None, None, None] + torch.arange(4)[:, None, None] + torch.arange(9)[:, None] + KEY
HIDES: dict[str, tuple[dict[str, Any], Tensor]] = {  # keywords, and what they leave visible
    "window": ({"window": (2, 1)}, (DISTANCE >= -2) & (DISTANCE <= 1)),
    "window of one number": ({"window": 2}, DISTANCE.abs() <= 2),
    "window to the left": ({"window": (3, None)}, DISTANCE >= -3),
    "window to the right": ({"window": (None, 3)}, DISTANCE <= 3),
    "window of nothing beside oneself": ({"window": 0}, DISTANCE == 0),
    "causal window": ({"window": (3, 2), "causal": True}, (DISTANCE >= -3) & (DISTANCE <= 0)),
    "mask": ({"mask": SEEN}, SEEN),
    "padding": ({"mask": LENGTHS[:, None, None]}, LENGTHS[:, None, None]),
    "mask of two axes": ({"mask": SEEN[0, 0]}, SEEN[0, 0]),
    "bias of -inf": ({"bias": torch.zeros(SEEN.shape).masked_fill(~SEEN, -INF)}, SEEN),
    "bias of bfloat16's lowest": (
        {"bias": torch.zeros(SEEN.shape).masked_fill(~SEEN, torch.finfo(torch.bfloat16).min).bfloat16()},
        SEEN,
    ),
    "mask_mod": ({"mask_mod": THIRDS}, SUMS % 3 > 0),
    "all together": (
        {"causal": True, "window": 3, "mask": SEEN, "mask_mod": APART},
        (DISTANCE <= 0) & (DISTANCE >= -3) & SEEN & (KEY != POSITION + 2),
    ),
}


@pytest.mark.parametrize("name", HIDES)
def test_hidden_keys_equal_sdpa_with_a_mask(name: str) -> None:
    options, visible = HIDES[name]
    visible = visible.expand(2, 4, 9, 7)
    x = inputs(9, 7)
    o, lse = attention(*x, return_lse=True, **options)
    some = visible.any(-1)
    want = by_sdpa(*x, torch.zeros(()).double().where(visible | ~some[..., None], -INF))
    assert (o[~some] == 0).all() and (lse[~some] == -INF).all() and lse[some].isfinite().all()
    equal(o[some], want[some])
    do = torch.randn_like(o) * some[..., None]
    for got, wanted in zip(*(torch.autograd.grad(t, x, do) for t in (o, want)), strict=True):
        equal(got, wanted)


@pytest.mark.parametrize("shape", [(2, 4, 9, 7), (1, 4, 1, 7), (9, 1), (2, 1, 9, 1), ()])
def test_bias_and_its_gradient_equal_sdpas(shape: tuple[int, ...]) -> None:
    x, bias = inputs(9, 7), torch.randn(shape, requires_grad=True)
    do = torch.randn(2, 4, 9, 5).double()
    got, want = attention(*x, bias=bias), by_sdpa(*x, bias.double())
    equal(got, want)
    for grad, wanted in zip(*(torch.autograd.grad(o, (*x, bias), do) for o in (got, want)), strict=True):
        equal(grad, wanted, atol=1e-13 if grad.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_alibi_is_a_bias_of_distances(shape: tuple[int, ...]) -> None:
    x, slopes = inputs(9, 7), torch.rand(shape, dtype=torch.float64, requires_grad=True)
    want = attention(*x, bias=-slopes.reshape(-1, 4, 1, 1) * DISTANCE.abs())
    got = attention(*x, alibi_slopes=slopes)
    equal(got, want)
    do = torch.randn_like(got)
    for grad, wanted in zip(*(torch.autograd.grad(o, (*x, slopes), do) for o in (got, want)), strict=True):
        equal(grad, wanted, atol=1e-12)
    equal(attention(*x, alibi_slopes=slopes, q_offset=-3), attention(*(t[:, :, :] for t in x), q_offset=-3,
          bias=-slopes.reshape(-1, 4, 1, 1) * (DISTANCE + 1).abs()))  # fmt: skip


def test_one_score_in_the_order_of_its_features() -> None:
    """Two keys: softcap, then bias, then ALiBi, then score_mod; lse is the logarithm of two exponentials."""
    q, k, v = torch.tensor([[[[3.0]]]]), torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
    mod = ScoreMod(None, lambda s, b, h, i, j, args: 2 * s + j, None)
    options = {
        "softcap": 2.0,
        "bias": torch.tensor([0.5, 0.25]),
        "alibi_slopes": torch.tensor([0.125]),
        "score_mod": mod,
    }
    _, lse = attention(q, k, v, scale=0.5, q_offset=3, return_lse=True, **options)
    first = 2 * (2 * torch.tensor(1.5 / 2).double().tanh() + 0.5 - 0.125 * 3)
    second = 2 * (2 * torch.tensor(3.0 / 2).double().tanh() + 0.25 - 0.125 * 2) + 1
    equal(lse.squeeze(), torch.logaddexp(first, second))


def test_a_softcap_is_its_score_mod() -> None:
    x = inputs(9, 7)
    equal(attention(*x, softcap=1.5), attention(*x, score_mod=tanh_softcap(1.5)), atol=1e-7)  # its cap is float32


def test_positions_move_causal_window_and_alibi_only() -> None:
    x = inputs(9, 7)
    raw = {
        "mask_mod": MaskMod(None, lambda b, h, i, j, args: j <= i),
        "score_mod": ScoreMod(None, lambda s, b, h, i, j, args: s - (i - j).abs(), None),
    }
    assert torch.equal(attention(*x, q_offset=5, **raw), attention(*x, q_offset=0, **raw))
    for options in ({"causal": True}, {"window": 1}, {"alibi_slopes": torch.ones(4)}):
        assert not torch.equal(attention(*x, q_offset=5, **options), attention(*x, q_offset=0, **options))


@pytest.mark.parametrize("causal", [False, True])
def test_a_sink_is_a_key_of_that_score_without_a_value(causal: bool) -> None:
    q, k, v = inputs(9, 7, heads_k=4)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    got = attention(q, k, v, sinks=sinks, causal=causal, return_lse=True)
    # one more number in every head: 1 in q, the sink in the last key, 0 in the others
    q1 = torch.cat((q, torch.ones(2, 4, 9, 1)), -1)
    k1 = F.pad(torch.cat((F.pad(k, (0, 0, 0, 1)), torch.zeros(2, 4, 8, 1)), -1), (0, 0))
    k1 = k1 + F.pad(sinks[None, :, None, None].expand(2, 4, 1, 1) * 8**0.5, (8, 0, 7, 0))
    mask = F.pad(DISTANCE <= 0, (0, 1), value=True) if causal else None
    want = attention(q1, k1, F.pad(v, (0, 0, 0, 1)), mask=mask, scale=8**-0.5, return_lse=True)
    do = torch.randn_like(got[0]), torch.randn_like(got[1])
    for one, other in zip(got, want, strict=True):
        equal(one, other)
    for one, other in zip(
        *(torch.autograd.grad(t, (q, k, v, sinks), do, retain_graph=True) for t in (got, want)), strict=True
    ):
        equal(one, other, atol=1e-12)
    o, lse = got
    formula = ((sinks[:, None] - lse).exp() * (do[1] - (do[0] * o).sum(-1))).sum((0, 2))
    equal(torch.autograd.grad(got, sinks, do, retain_graph=True)[0], formula)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (1, 1)},
    "mask": {"mask": torch.tensor([True, False, True, True])},
    "bias": {"bias": torch.tensor([[0.5, -INF, 1.0, -1.0]] * 2 + [[-INF] * 4] * 3).double()},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.7]).double()},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": torch.tensor([0.3, -0.7]).double()},
    "dropout": {"dropout_mask": 2.0 * (torch.arange(20).view(5, 4) % 3 > 0)},
    "score_mod": {"score_mod": ScoreMod(None, lambda s, b, h, i, j, args: s * s - (i - j), None)},
    "mask_mod": {"mask_mod": MaskMod(None, lambda b, h, i, j, args: (i + j + b) % 3 > 0)},
}
GRADIENTS = ("bias", "alibi_slopes", "sinks")


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize(
    "names", [*itertools.combinations(FEATURES, 1), ("bias", "alibi", "sinks", "softcap"), FEATURES]
)
def test_gradcheck_of_features(names: tuple[str, ...]) -> None:
    q, k, v = inputs(5, 4, heads=2, heads_k=1, head_dim_v=3)
    options = {key: value for name in names for key, value in FEATURES[name].items()}
    leaves = {key: options[key].clamp(min=-1.0).requires_grad_() for key in GRADIENTS if key in options}

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        operands = dict(zip(leaves, args[3:], strict=True))
        if "bias" in operands:  # gradcheck moves numbers, and -inf does not move
            operands["bias"] = operands["bias"].masked_fill(options["bias"] == -INF, -INF)
        o, lse = attention(*args[:3], causal=True, q_offset=-1, return_lse=True, **{**options, **operands})
        return o, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v, *leaves.values()))


EMPTY: dict[str, dict[str, Any]] = {
    "mask": {"mask": torch.zeros(1, 1, dtype=torch.bool)},
    "window": {"window": 1, "q_offset": -100},
    "causal": {"causal": True, "q_offset": -100},
    "bias of -inf": {"bias": torch.full((7,), -INF)},
    "bias of float16's lowest": {"bias": torch.full((1, 1, 9, 7), torch.finfo(torch.float16).min).half()},
    "mask_mod": {"mask_mod": MaskMod(None, lambda b, h, i, j, args: i < 0)},
    "a segment of no key": {"mask_mod": document(torch.zeros(9).int(), torch.ones(7).int())},
    "block_mask": {"block_mask": create_block_mask(lambda b, h, i, j: i < 0, None, None, 9, 7, "cpu", 16)},
    "score_mod": {"score_mod": ScoreMod(None, lambda s, b, h, i, j, args: s - INF, None)},
}


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_rows_emptied_by_any_means(name: str, with_sinks: bool) -> None:
    x = inputs(9, 7)
    options = {"alibi_slopes": torch.rand(4).double(), **EMPTY[name]}
    if with_sinks:
        options["sinks"] = torch.randn(4).double()
    leaves = {key: options[key].requires_grad_() for key in GRADIENTS if key in options}
    o, lse = attention(*x, return_lse=True, **{**options, **leaves})
    assert (o == 0).all()
    assert torch.equal(lse, leaves["sinks"][:, None].expand_as(lse) if with_sinks else torch.full_like(lse, -INF))
    dlse = torch.randn_like(lse)
    grads = torch.autograd.grad((o, lse), (*x, *leaves.values()), (torch.randn_like(o), dlse))
    if with_sinks:
        equal(grads[-1], dlse.sum((0, 2)))
    for grad in grads[:-1] if with_sinks else grads:
        assert (grad == 0).all()


@pytest.mark.parametrize("name", HIDES)
def test_nan_in_what_nobody_sees_reaches_nothing(name: str) -> None:
    """Keys and values seen by none; a bias and a score_mod where keys are hidden."""
    options, visible = HIDES[name]
    visible = (visible & (KEY != 5)).expand(2, 4, 9, 7)
    x = inputs(9, 7)
    results = []
    for planted in (1.0, float("nan")):
        q, k, v = (t.detach().clone().requires_grad_() for t in x)
        with torch.no_grad():
            k[:, :, 5], v[:, :, 5] = planted, planted
        factor = torch.ones(visible.shape).masked_fill(~visible, planted)
        mod = ScoreMod(None, lambda s, b, h, i, j, args: s * args[0] + 1, None, (factor,))
        bias = torch.where(visible, 0.5, planted).double().requires_grad_()
        given = {**options, "mask": options.get("mask", KEY >= 0) & visible, "bias": bias, "score_mod": mod}
        o, lse = attention(q, k, v, return_lse=True, sinks=torch.zeros(4), **given)
        results.append((o, lse, *torch.autograd.grad(o.sum() + lse.sum(), (q, k, v, bias))))
    for want, got in zip(*results, strict=True):
        equal(got, want)
        assert got.isfinite().all()


def from_closure(closure: Any, block: int | tuple[int, int] = 16, batch: Any = None, heads: Any = None) -> BlockMask:
    return create_block_mask(closure, batch, heads, 45, 39, "cpu", block)


@pytest.mark.parametrize("block", [16, (16, 32)])
@pytest.mark.parametrize("sizes", [(None, None), (2, None), (2, 4)])
def test_a_block_mask_equals_its_mask(sizes: tuple[Any, Any], block: Any) -> None:
    def closure(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i + 5 * b * (sizes[0] is not None) >= j) & (j + 9 > i // 2)) | (h * (sizes[1] is not None) == 3)

    x = inputs(45, 39)
    b, h, i, j = (torch.arange(n).view(-1, *[1] * axes) for n, axes in ((2, 3), (4, 2), (45, 1), (39, 0)))
    mask = closure(b, h, i, j)
    assert not mask.all()
    equal(attention(*x, block_mask=from_closure(closure, block, *sizes)), attention(*x, mask=mask))


def test_a_block_mask_is_its_blocks_and_only_in_part_its_function() -> None:
    """Blocks [query][key]: two left out, two whole; in the others the function hides odd keys. 9 is no block."""
    counts, indices = torch.tensor([[[1, 2, 2]]]), torch.tensor([[[[1, 9, 9], [0, 1, 9], [1, 2, 9]]]])
    full = torch.tensor([[[1, 0, 1]]]), torch.tensor([[[[2, 0, 0], [0, 0, 0], [0, 0, 0]]]])
    blocks = BlockMask.from_kv_blocks(
        counts.int(), indices.int(), full[0].int(), full[1].int(), BLOCK_SIZE=16,
        mask_mod=lambda b, h, i, j: j % 2 == 0, seq_lengths=(45, 39), compute_q_blocks=False,
    )  # fmt: skip
    state = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 1, 1]])
    state = state.repeat_interleave(16, 0).repeat_interleave(16, 1)[:45, :39]
    mask = (state == 2) | ((state == 1) & (torch.arange(39) % 2 == 0))
    x = inputs(45, 39)
    equal(attention(*x, block_mask=blocks), attention(*x, mask=mask))
    equal(attention(*x, block_mask=blocks, causal=True), attention(*x, mask=mask, causal=True))


CU_Q, CU_K = torch.tensor([0, 3, 3, 8, 12]).int(), torch.tensor([1, 6, 8, 8, 12]).int()  # of 14 queries and 13 keys


def packed_inputs() -> tuple[list[Tensor], dict[str, Any]]:
    """[total, heads, head_dim], and every operand with its axes full."""
    x = [torch.randn(n, heads, 8, dtype=torch.float64, requires_grad=True) for n, heads in ((14, 4), (13, 2), (13, 2))]
    options = {
        "mask": torch.rand(4, 4, 5, 5) > 0.2,
        "bias": torch.randn(4, 4, 5, 5, requires_grad=True),
        "alibi_slopes": torch.rand(4, 4, requires_grad=True),
        "sinks": torch.randn(4, requires_grad=True),
        "dropout_mask": 2.0 * (torch.rand(4, 4, 5, 5) > 0.5),
        "mask_mod": MaskMod(None, lambda b, h, i, j, args: (b + i + j) % 4 > 0),
        "score_mod": ScoreMod(None, lambda s, b, h, i, j, args: s * (1 + b) + i, None),
    }
    return x, options


@pytest.mark.parametrize("q_offset", [None, 2, torch.tensor([0, 1, -1, 2])], ids=["ends", "2", "each"])
def test_packed_sequences_equal_each_alone(q_offset: Any) -> None:
    (q, k, v), options = packed_inputs()
    common = {"causal": True, "window": 3, "softcap": 2.0}
    o, lse = attention_varlen(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, q_offset=q_offset, return_lse=True,
                              **common, **options)  # fmt: skip
    assert o.shape == (14, 4, 8) and lse.shape == (4, 14)
    assert (o[12:] == 0).all() and (lse[:, 12:] == -INF).all()
    total = torch.zeros(())
    for b, (rows, keys) in enumerate(zip(*(itertools.pairwise(c.tolist()) for c in (CU_Q, CU_K)), strict=True)):
        (q0, q1), (k0, k1) = rows, keys
        own = {name: options[name][b : b + 1, :, : q1 - q0, : k1 - k0] for name in ("mask", "bias", "dropout_mask")}
        own |= {"alibi_slopes": options["alibi_slopes"][b], "sinks": options["sinks"]}
        own["mask_mod"] = MaskMod(None, lambda _, h, i, j, args, b=b: (b + i + j) % 4 > 0)
        own["score_mod"] = ScoreMod(None, lambda s, _, h, i, j, args, b=b: s * (1 + b) + i, None)
        offset = q_offset[b] if isinstance(q_offset, Tensor) else q_offset
        one = (q[None, q0:q1].transpose(1, 2), *(t[None, k0:k1].transpose(1, 2) for t in (k, v)))
        o_own, lse_own = attention(*one, q_offset=offset, return_lse=True, **common, **own)
        assert torch.equal(o[q0:q1], o_own[0].transpose(0, 1)) and torch.equal(lse[:, q0:q1], lse_own[0])
        total = total + o_own.sum() + lse_own[lse_own.isfinite()].sum()
    leaves = (q, k, v, options["bias"], options["alibi_slopes"], options["sinks"])
    want = torch.autograd.grad(total, leaves)
    for got, wanted in zip(torch.autograd.grad(o.sum() + lse[:, :12].sum(), leaves), want, strict=True):
        equal(got, wanted, atol=1e-12 if got.dtype == torch.float64 else 1e-4)


def test_a_packed_block_mask_counts_packed_rows() -> None:
    (q, k, v), _ = packed_inputs()
    blocks = create_block_mask(lambda b, h, i, j: (i + j) % 3 > 0, None, None, 14, 13, "cpu", 16)
    mask = torch.zeros(4, 1, 5, 5, dtype=torch.bool)
    for b in range(4):
        mask[b] = (torch.arange(5)[:, None] + CU_Q[b] + torch.arange(5) + CU_K[b]) % 3 > 0
    x = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    assert torch.equal(attention_varlen(q, k, v, block_mask=blocks, **x), attention_varlen(q, k, v, mask=mask, **x))
    more = torch.rand(4, 1, 1, 5) > 0.3
    both = attention_varlen(q, k, v, block_mask=blocks, mask=more, **x)
    assert torch.equal(both, attention_varlen(q, k, v, mask=mask & more, **x))


HOSTILE = {  # what takes the place of CU_Q, and which sequences that spoils
    "falling": ([0, 3, 2, 8, 12], [1, 2]),
    "negative": ([-1, 3, 3, 8, 12], [0]),
    "beyond the end": ([0, 3, 3, 8, 15], [3]),
    "far beyond": ([0, 3, 2**31 - 1, 8, 12], [1, 2, 3]),
    "longer than the mask": ([0, 3, 3, 12, 14], [2]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lengths_spoil_their_own_sequences(name: str) -> None:
    lengths, spoilt = HOSTILE[name]
    (q, k, v), options = packed_inputs()
    cu_q = torch.tensor(lengths).int()
    starts = cu_q.cummax(0).values.clamp(0, 14)
    o, lse = attention_varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=CU_K, return_lse=True, **options)
    leaves = (q, k, v, options["bias"], options["alibi_slopes"], options["sinks"])
    dq, dk, dv, *others = torch.autograd.grad(o.sum(), leaves)
    for rows, bounds, found in ((14, starts, (o, lse.T, dq)), (13, CU_K, (dk, dv))):
        bad = torch.zeros(rows, dtype=torch.bool)
        for b in spoilt:
            bad[bounds[b] : bounds[b + 1]] = True
        for t in found:
            assert t[bad].isnan().all() and not t[~bad].isnan().any()
    assert all(t.isfinite().all() for t in others)
