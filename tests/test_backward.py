"""The backward kernels against the oracle: each gradient by name, where they read, and that they repeat bit for bit."""

from typing import Any

import pytest
import torch

from flash.attention import flash_attention
from flash.kernels.spec import Config, Configs
from tests import calls
from tests.bounds import Inputs, Outputs, check, complaints
from tests.calls import CONFIGS, Place, random_inputs

pytestmark = pytest.mark.interpret

LENGTHS = (0, 1, 2, 17, 63)
GRADIENTS = ("dq", "dk", "dv")


def assert_same(got: Outputs, want: Outputs, note: str = "") -> None:
    for name in GRADIENTS:
        assert torch.equal(getattr(got, name), getattr(want, name)), f"{name} {note}"


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128])
def test_float64_is_exact_to_the_twelfth_digit(place: Place, head_dim: int, causal: bool) -> None:
    x = random_inputs(place, seqlen_q=50, head_dim=head_dim, sigma=3.0, dtype=torch.float64, causal=causal)
    check(calls.backward(x), x)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("sigma", [1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_those_of_standard_attention(place: Place, dtype: torch.dtype, causal: bool, sigma: float) -> None:
    x = random_inputs(place, seqlen_q=113, head_dim=64, dtype=dtype, sigma=sigma, causal=causal)
    check(calls.backward(x), x)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [*LENGTHS, 113])
@pytest.mark.parametrize("seqlen_q", LENGTHS)
def test_every_length_meets_every_length(place: Place, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    x = random_inputs(place, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=16, causal=causal)
    check(calls.backward(x), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("q_offset", [-200, -40, -1, 0, 5, 31, 32, 62, 200, 2**40, -(2**40)])
def test_a_causal_query_sees_the_keys_up_to_its_own_position(place: Place, q_offset: int) -> None:
    x = random_inputs(place, seqlen_q=63, seqlen_k=50, causal=True, q_offset=q_offset)
    check(calls.backward(x), x)


@pytest.mark.parametrize("offsets", [7, [0, -30, 12], [-200, 2**40, 31]])
def test_the_position_may_be_a_tensor(place: Place, offsets: Any) -> None:
    q_offset = place(torch.tensor(offsets, dtype=torch.int64))
    x = random_inputs(place, batch=3, seqlen_q=33, seqlen_k=50, causal=True, q_offset=q_offset)
    check(calls.backward(x), x)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("heads, heads_k", [(4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_key_head_gathers_the_gradients_of_its_group(
    place: Place, heads: int, heads_k: int, dtype: torch.dtype
) -> None:
    x = random_inputs(place, batch=2, heads=heads, heads_k=heads_k, seqlen_q=33, dtype=dtype, causal=True)
    check(calls.backward(x), x)


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    "head_dim, head_dim_v",
    [(1, 1), (3, 3), (16, 16), (40, 40), (72, 72), (192, 192), (256, 256), (512, 512), (192, 128), (24, 72), (1, 40)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_head_dim(place: Place, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    small = Config(16, 16, 4, 1)
    x = random_inputs(place, seqlen_q=37, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, causal=True)
    check(calls.backward(x, Configs(small, small, small)), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-12, 1e-38, 0.1, 3.0, -20.0])
def test_any_scale(place: Place, scale: float, dtype: torch.dtype) -> None:
    x = random_inputs(place, seqlen_q=33, dtype=dtype, causal=True, scale=scale)
    check(calls.backward(x), x)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_gradients_under_a_huge_scale_are_numbers(place: Place, scale: float) -> None:
    x = random_inputs(place, seqlen_q=33, sigma=0.25, scale=scale)
    got = calls.backward(x._replace(dlse=None))
    assert not any(getattr(got, name).isnan().any() for name in GRADIENTS)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_any_tile(place: Place, block_m: int, block_n: int) -> None:
    tile = Config(block_m, block_n, 4, 1)
    x = random_inputs(place, seqlen_q=50, seqlen_k=81, causal=True, q_offset=20)
    check(calls.backward(x, Configs(tile, tile, tile)), x)


@pytest.mark.parametrize("with_do, with_dlse", [(True, False), (False, True), (True, True)])
def test_the_gradient_of_lse_counts(place: Place, with_do: bool, with_dlse: bool) -> None:
    x = random_inputs(place, seqlen_q=50, dtype=torch.float64, causal=True, q_offset=-3)
    x = x._replace(do=x.do if with_do else torch.zeros_like(x.do), dlse=x.dlse if with_dlse else None)
    check(calls.backward(x), x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("needs", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_only_the_wanted_gradients_are_computed(
    place: Place, launches: list[Any], needs: tuple[bool, bool, bool]
) -> None:
    x = random_inputs(place, heads=4, seqlen_q=33, dtype=torch.bfloat16, causal=True)
    want = calls.backward(x)
    launches.clear()
    got = calls.backward(x, needs=needs, found=want)
    for name, need in zip(GRADIENTS, needs, strict=True):
        gradient = getattr(got, name)
        assert torch.equal(gradient, getattr(want, name)) if need else gradient is None, name
    if not x.q.is_cuda:
        ran = {launch.kernel for launch in launches} - {"delta_kernel"}
        assert ran == {kernel for kernel, need in (("dq_kernel", needs[0]), ("dkdv_kernel", any(needs[1:]))) if need}


def test_rows_without_keys_and_keys_without_rows_have_zero_gradients(place: Place) -> None:
    x = random_inputs(place, seqlen_q=50, causal=True, q_offset=-20)
    got = calls.backward(x)
    assert (got.dq[:, :, :20] == 0).all() and (got.dk[:, :, 30:] == 0).all() and (got.dv[:, :, 30:] == 0).all()
    assert got.dq[:, :, 21:].all() and got.dv[:, :, :30].all()
    for sizes in (
        {"seqlen_q": 5, "seqlen_k": 0},
        {"seqlen_q": 0, "seqlen_k": 5},
        {"batch": 0},
        {"heads": 0, "heads_k": 0},
    ):
        empty = calls.backward(random_inputs(place, **sizes))
        assert all((getattr(empty, name) == 0).all() for name in GRADIENTS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_query_row_leaves_the_other_rows_alone(place: Place, poison: float) -> None:
    x = random_inputs(place, seqlen_q=50, causal=True)
    clean = calls.backward(x)
    x.q[0, 1, 20, 3] = poison
    got = calls.backward(x)
    others = torch.ones_like(got.lse, dtype=torch.bool)
    others[0, 1, 20] = False
    assert torch.equal(got.dq[others], clean.dq[others])
    assert torch.equal(got.dk[0, 0], clean.dk[0, 0]) and torch.equal(got.dv[0, 0], clean.dv[0, 0])
    assert torch.equal(got.dk[0, 1, 21:], clean.dk[0, 1, 21:]) and torch.equal(got.dv[0, 1, 21:], clean.dv[0, 1, 21:])
    assert got.dk[0, 1, :21].isnan().any()


@pytest.mark.parametrize("names", ["k", "v", "kv"])
def test_a_bad_key_reaches_only_the_rows_that_see_it(place: Place, names: str) -> None:
    x = random_inputs(place, seqlen_q=63, causal=True)
    clean = calls.backward(x)
    for name in names:
        getattr(x, name)[0, 1, 40, 3] = float("nan")
    got = calls.backward(x)
    assert torch.equal(got.dq[:, :, :40], clean.dq[:, :, :40])
    for name in GRADIENTS:
        assert torch.equal(getattr(got, name)[:, 0], getattr(clean, name)[:, 0]), name


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seqlen_q, q_offset", [(20, 0), (33, -3), (16, 15), (1, 30)])
def test_keys_that_no_query_sees_never_show(place: Place, seqlen_q: int, q_offset: int, dtype: torch.dtype) -> None:
    x = random_inputs(place, seqlen_q=seqlen_q, seqlen_k=50, dtype=dtype, causal=True, q_offset=q_offset)
    clean = calls.backward(x)
    for t in (x.k, x.v):
        t[:, :, seqlen_q + q_offset :] = float("nan")
    assert_same(calls.backward(x), clean)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("factor", [1.0, 3.0, 5.0, 50.0])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (2, 5), (5, 2), (17, 17), (1, 17)])
def test_short_tails_stay_finite(place: Place, seqlen_q: int, seqlen_k: int, factor: float) -> None:
    x = random_inputs(place, heads=4, heads_k=4, seqlen_q=seqlen_q, seqlen_k=seqlen_k, sigma=factor)
    check(calls.backward(x), x, saturated=True)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", range(7))
def test_strides_change_no_bit(place: Place, kind: int) -> None:
    dtype = torch.bfloat16
    sizes = {"batch": 2, "heads": 2, "heads_k": 2, "seqlen_q": 20, "seqlen_k": 50, "head_dim": 24}
    x = random_inputs(place, **sizes, dtype=dtype, causal=True, q_offset=31)  # full tiles and partial ones
    want = calls.backward(x)
    for name in ("q", "k", "v", "do"):
        t = getattr(x, name)
        view = list(calls.strided(place, tuple(t.shape), dtype).values())[kind]
        assert_same(calls.backward(x._replace(**{name: view.copy_(t)}), found=want), want, f"with {name} strided")


def test_expanded_gradients_change_no_bit(place: Place) -> None:
    x = random_inputs(place, batch=2, heads=2, seqlen_q=20, causal=True)
    do, dlse = x.do[:1, :1, :1].expand(x.do.shape), x.dlse[:, :, :1].expand(x.dlse.shape)
    want = calls.backward(x._replace(do=do.contiguous(), dlse=dlse.contiguous()))
    assert_same(calls.backward(x._replace(do=do, dlse=dlse)), want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("axis", ["batch", "head", "row", "tile"])
def test_offsets_beyond_32_bits_are_followed(place: Place, device: torch.device, axis: str) -> None:
    x = calls.far_inputs(place, axis)
    want = calls.backward(x)
    for name in ("q", "k", "v", "do"):
        far = calls.far_apart(getattr(x, name), axis, device)
        got = calls.backward(x._replace(**{name: far}), found=want)
        for gradient in GRADIENTS:
            assert torch.equal(getattr(got, gradient), getattr(want, gradient)), f"{gradient} with {name} far apart"


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret(gpu=False)  # the interpreter counts the work
@pytest.mark.parametrize("seqlen_q, seqlen_k, q_offset", [(113, 113, 0), (50, 90, 40), (90, 50, -40), (64, 64, 64)])
def test_tiles_that_nobody_sees_are_never_loaded(
    place: Place, launches: list[Any], seqlen_q: int, seqlen_k: int, q_offset: int
) -> None:
    x = random_inputs(place, heads=2, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True, q_offset=q_offset)
    calls.backward(x)
    work = {launch.kernel: launch for launch in launches}
    m, n = CONFIGS.dkdv.block_m, CONFIGS.dkdv.block_n
    assert work["dkdv_kernel"].dots == 2 * 4 * calls.tiles_seen(seqlen_q, seqlen_k, q_offset, m, n)
    m, n = CONFIGS.dq.block_m, CONFIGS.dq.block_n
    assert work["dq_kernel"].dots == 2 * 3 * calls.tiles_seen(seqlen_q, seqlen_k, q_offset, m, n)
    assert work["delta_kernel"].loads["o"] == 2 * seqlen_q * 32


def test_the_same_call_gives_the_same_bits_alone_or_in_a_batch(place: Place) -> None:
    x = random_inputs(place, batch=2, heads=4, seqlen_q=33, dtype=torch.bfloat16, causal=True)
    want = calls.backward(x)
    assert_same(calls.backward(x), want)
    pick = (slice(1, 2), slice(2, 4)), (slice(1, 2), slice(1, 2))
    alone = Inputs(x.q[pick[0]], x.k[pick[1]], x.v[pick[1]], x.do[pick[0]], x.dlse[pick[0]], x.options)
    expected = Outputs(want.o, want.lse, want.dq[pick[0]], want.dk[pick[1]], want.dv[pick[1]])
    assert_same(calls.backward(alone), expected)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, heads_k, scale", [(2, 2, None), (2, 1, 0.3), (2, 1, -0.7)])
def test_gradcheck(place: Place, heads: int, heads_k: int, scale: float | None, causal: bool) -> None:
    x = random_inputs(place, heads=heads, heads_k=heads_k, seqlen_q=5, seqlen_k=7, head_dim=3, dtype=torch.float64)
    tensors = tuple(t.requires_grad_() for t in x[:3])

    def attention(*qkv: torch.Tensor) -> Any:
        return flash_attention(*qkv, causal=causal, scale=scale, return_lse=True, backend="triton")

    assert torch.autograd.gradcheck(attention, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autograd_reaches_these_kernels(place: Place, dtype: torch.dtype) -> None:
    x = random_inputs(place, heads=2, heads_k=1, seqlen_q=20, seqlen_k=37, dtype=dtype, causal=True)
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    config = {"forward": CONFIGS.forward, "dkdv": CONFIGS.dkdv, "dq": CONFIGS.dq}
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend="triton", config=config)
    torch.autograd.backward((o, lse), (x.do, x.dlse))
    want = calls.backward(x)
    assert torch.equal(o, want.o) and torch.equal(lse, want.lse)
    assert_same(Outputs(o, lse, q.grad, k.grad, v.grad), want)


def test_a_wrong_gradient_would_be_seen(place: Place) -> None:
    x = random_inputs(place, seqlen_q=33, dtype=torch.bfloat16, causal=True)
    got = calls.backward(x)
    assert complaints(got._replace(dk=got.dk * 1.05), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place_of_value", ["q", "do"])
def test_a_bad_row_reaches_only_the_keys_it_sees(place: Place, place_of_value: str, value: float) -> None:
    x = random_inputs(place, seqlen_q=40, head_dim=16, causal=True)
    assert x.do is not None
    bad = 21
    if place_of_value == "q":
        x.q[:, :, bad, 3] = value
        o = calls.forward(x).o
        x.do.copy_(2 * o)  # as a loss that is a sum of squares would send it back
        assert not bool(o[:, :, bad].isfinite().any())
    else:
        x.do[:, :, bad, 3] = value
    got = calls.backward(x)
    for gradient in (got.dk, got.dv):
        assert gradient is not None
        finite = gradient.isfinite().all(-1)
        assert bool(finite[:, :, bad + 1 :].all())
        assert not bool(finite[:, :, : bad + 1].any())
