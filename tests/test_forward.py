"""The forward kernel against the oracle: what it computes, where it reads, and what it never looks at."""

from typing import Any

import pytest
import torch

from flash.attention import flash_attention
from flash.kernels.spec import Config
from tests import calls
from tests.bounds import Inputs, check, oracle
from tests.calls import Place, random_inputs

pytestmark = pytest.mark.interpret

LENGTHS = (0, 1, 2, 17, 63, 113)
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128])
def test_float64_is_exact_to_the_twelfth_digit(place: Place, head_dim: int, causal: bool) -> None:
    x = random_inputs(place, head_dim=head_dim, sigma=3.0, dtype=torch.float64, causal=causal)
    check(calls.forward(x), x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sigma", [1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_errors_are_those_of_standard_attention(place: Place, dtype: torch.dtype, causal: bool, sigma: float) -> None:
    x = random_inputs(place, seqlen_q=113, head_dim=64, dtype=dtype, sigma=sigma, causal=causal)
    check(calls.forward(x), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", LENGTHS)
@pytest.mark.parametrize("seqlen_q", LENGTHS)
def test_every_length_meets_every_length(place: Place, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    x = random_inputs(place, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=16, causal=causal)
    check(calls.forward(x), x)


@pytest.mark.parametrize("q_offset", [-200, -40, -1, 0, 5, 31, 32, 62, 200, 2**40, -(2**40)])
def test_a_causal_query_sees_the_keys_up_to_its_own_position(place: Place, q_offset: int) -> None:
    x = random_inputs(place, seqlen_q=63, seqlen_k=50, causal=True, q_offset=q_offset)
    check(calls.forward(x), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [7, [0, -30, 12], [-200, 200, 31]])
def test_the_position_may_be_a_tensor(place: Place, offsets: Any, dtype: torch.dtype) -> None:
    q_offset = place(torch.tensor(offsets, dtype=dtype))
    x = random_inputs(place, batch=3, seqlen_q=33, seqlen_k=50, causal=True, q_offset=q_offset)
    check(calls.forward(x), x)


def test_a_position_beyond_32_bits_sees_every_key(place: Place) -> None:
    q_offset = place(torch.tensor([2**40, -(2**40)]))
    x = random_inputs(place, batch=2, seqlen_q=20, seqlen_k=33, causal=True, q_offset=q_offset)
    check(calls.forward(x), x)


@pytest.mark.parametrize("heads, heads_k", [(4, 4), (4, 2), (4, 1), (6, 3), (3, 1)])
def test_groups_of_query_heads_share_a_key_head(place: Place, heads: int, heads_k: int) -> None:
    x = random_inputs(place, batch=2, heads=heads, heads_k=heads_k, seqlen_q=20, seqlen_k=37, causal=True)
    check(calls.forward(x), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize(
    "head_dim, head_dim_v",
    [(1, 1), (3, 3), (16, 16), (40, 40), (72, 72), (192, 192), (256, 256), (512, 512), (192, 128), (24, 72), (1, 40)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_head_dim(place: Place, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    small = Config(16, 16, 4, 1)
    x = random_inputs(place, seqlen_q=37, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, causal=True)
    check(calls.forward(x, small), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-12, 1e-38, 0.1, 3.0, -20.0])
def test_any_scale(place: Place, scale: float, dtype: torch.dtype) -> None:
    x = random_inputs(place, seqlen_q=33, dtype=dtype, causal=True, scale=scale)
    check(calls.forward(x), x)


@pytest.mark.parametrize("scale", [1e4, 1e30, -1e30, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_scale_picks_the_best_key(place: Place, scale: float, dtype: torch.dtype) -> None:
    x = random_inputs(place, seqlen_q=33, sigma=0.25, dtype=dtype, scale=scale)
    got, want = calls.forward(x), oracle(x)
    assert got.o.isfinite().all()
    assert torch.allclose(got.o.double(), want.o, rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_any_tile(place: Place, block_m: int, block_n: int) -> None:
    x = random_inputs(place, seqlen_q=50, seqlen_k=81, causal=True, q_offset=20)
    check(calls.forward(x, Config(block_m, block_n, 4, 1)), x)


def test_rows_without_keys_return_zero_and_minus_infinity(place: Place) -> None:
    x = random_inputs(place, seqlen_q=50, causal=True, q_offset=-20)
    got = calls.forward(x)
    assert (got.o[:, :, :20] == 0).all() and (got.lse[:, :, :20] == float("-inf")).all()
    assert got.o[:, :, 20:].all() and got.lse[:, :, 20:].isfinite().all()
    none = calls.forward(random_inputs(place, seqlen_q=5, seqlen_k=0))
    assert (none.o == 0).all() and (none.lse == float("-inf")).all()


def test_without_batch_heads_or_queries_there_is_nothing_to_do(place: Place) -> None:
    for sizes in ({"batch": 0}, {"heads": 0, "heads_k": 0}, {"seqlen_q": 0, "seqlen_k": 9}):
        x = random_inputs(place, **sizes)
        got = calls.forward(x)
        assert got.o.shape == x.q.shape and got.lse.shape == x.q.shape[:3]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bad_query_row_stays_alone(place: Place, poison: float, causal: bool) -> None:
    x = random_inputs(place, seqlen_q=50, causal=causal)
    clean = calls.forward(x)
    x.q[0, 1, 20, 3] = poison
    got = calls.forward(x)
    others = torch.ones_like(got.lse, dtype=torch.bool)
    others[0, 1, 20] = False
    assert torch.equal(got.o[others], clean.o[others]) and torch.equal(got.lse[others], clean.lse[others])
    assert poison == poison or got.o[0, 1, 20].isnan().all() and got.lse[0, 1, 20].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seqlen_q, q_offset", [(20, 0), (33, -3), (16, 15), (1, 30)])
def test_keys_that_no_query_sees_never_show(place: Place, seqlen_q: int, q_offset: int, dtype: torch.dtype) -> None:
    x = random_inputs(place, seqlen_q=seqlen_q, seqlen_k=50, dtype=dtype, causal=True, q_offset=q_offset)
    clean = calls.forward(x)
    for t in (x.k, x.v):
        t[:, :, seqlen_q + q_offset :] = float("nan")
    got = calls.forward(x)
    assert torch.equal(got.o, clean.o) and torch.equal(got.lse, clean.lse)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("names", ["k", "v", "kv"])
def test_a_bad_key_reaches_only_the_rows_that_see_it(
    place: Place, names: str, poison: float, dtype: torch.dtype
) -> None:
    x = random_inputs(place, seqlen_q=63, dtype=dtype, causal=True)
    clean = calls.forward(x)
    for name in names:
        getattr(x, name)[0, 1, 40, 3] = poison
    got, want = calls.forward(x), oracle(x)
    assert torch.equal(got.o[:, 0], clean.o[:, 0]) and torch.equal(got.o[:, :, :40], clean.o[:, :, :40])
    assert torch.equal(got.lse[:, 0], clean.lse[:, 0]) and torch.equal(got.lse[:, :, :40], clean.lse[:, :, :40])
    assert torch.equal(got.o.isfinite(), want.o.isfinite())


@pytest.mark.parametrize("factor", [1.0, 3.0, 5.0, 50.0])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (2, 5), (5, 2), (17, 17), (1, 17)])
def test_short_tails_stay_finite(place: Place, seqlen_q: int, seqlen_k: int, factor: float) -> None:
    x = random_inputs(place, heads=4, heads_k=4, seqlen_q=seqlen_q, seqlen_k=seqlen_k, sigma=factor)
    check(calls.forward(x), x, saturated=True)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", range(7))
def test_strides_change_no_bit(place: Place, kind: int, dtype: torch.dtype) -> None:
    sizes = {"batch": 2, "heads": 2, "heads_k": 2, "seqlen_q": 20, "seqlen_k": 50, "head_dim": 24}
    x = random_inputs(place, **sizes, dtype=dtype, causal=True, q_offset=31)  # full tiles and partial ones
    want = calls.forward(x)
    for name in ("q", "k", "v"):
        t = getattr(x, name)
        view = list(calls.strided(place, tuple(t.shape), dtype).values())[kind]
        got = calls.forward(x._replace(**{name: view.copy_(t)}))
        assert torch.equal(got.o, want.o) and torch.equal(got.lse, want.lse), name


def test_expanded_heads_and_batches_change_no_bit(place: Place) -> None:
    x = random_inputs(place, batch=2, heads=2, seqlen_q=20, causal=True)
    k, v = (t[:1, :1].expand(2, 2, -1, -1) for t in (x.k, x.v))
    want = calls.forward(x._replace(k=k.contiguous(), v=v.contiguous()))
    got = calls.forward(x._replace(k=k, v=v))
    assert torch.equal(got.o, want.o) and torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
@pytest.mark.parametrize("head_dim_v", [24, 40])
def test_the_output_is_dense_in_the_querys_axis_order(
    place: Place, order: tuple[int, int, int, int], head_dim_v: int
) -> None:
    x = random_inputs(place, batch=2, heads=3, heads_k=3, seqlen_q=5, head_dim=24, head_dim_v=head_dim_v)
    back = [order.index(axis) for axis in range(4)]
    got = calls.forward(x._replace(q=x.q.permute(order).contiguous().permute(back)))
    assert got.o.permute(order).is_contiguous() and got.lse.is_contiguous()


@pytest.mark.parametrize("axis", ["batch", "head", "row", "tile"])
def test_offsets_beyond_32_bits_are_followed(place: Place, device: torch.device, axis: str) -> None:
    x = calls.far_inputs(place, axis)
    want = calls.forward(x)
    for name in ("q", "k", "v"):
        got = calls.forward(x._replace(**{name: calls.far_apart(getattr(x, name), axis, device)}))
        assert torch.equal(got.o, want.o) and torch.equal(got.lse, want.lse), name


@pytest.mark.interpret(gpu=False)  # the interpreter counts the work
@pytest.mark.parametrize("seqlen_q, seqlen_k, q_offset", [(113, 113, 0), (50, 90, 40), (90, 50, -40), (64, 64, 64)])
def test_tiles_that_no_query_sees_are_never_loaded(
    place: Place, launches: list[Any], seqlen_q: int, seqlen_k: int, q_offset: int
) -> None:
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True, q_offset=q_offset)
    calls.forward(x, Config(32, 16, 4, 1))
    assert launches[-1].dots == 2 * calls.tiles_seen(seqlen_q, seqlen_k, q_offset, 32, 16)
    visible = sum(min(max(min(row + 32, seqlen_q) + q_offset, 0), seqlen_k) for row in range(0, seqlen_q, 32))
    assert launches[-1].loads["k"] == launches[-1].loads["v"] == visible * 32


def test_the_same_call_gives_the_same_bits_alone_or_in_a_batch(place: Place) -> None:
    x = random_inputs(place, batch=2, heads=4, seqlen_q=50, dtype=torch.bfloat16, causal=True)
    first, second = calls.forward(x), calls.forward(x)
    assert torch.equal(first.o, second.o) and torch.equal(first.lse, second.lse)
    alone = calls.forward(Inputs(x.q[1:, 2:3], x.k[1:, 1:2], x.v[1:, 1:2], options=x.options))
    assert torch.equal(alone.o, first.o[1:, 2:3]) and torch.equal(alone.lse, first.lse[1:, 2:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_public_function_calls_this_kernel(place: Place, launches: list[Any], dtype: torch.dtype) -> None:
    x = random_inputs(place, heads=4, seqlen_q=33, dtype=dtype, causal=True)
    o, lse = flash_attention(x.q, x.k, x.v, causal=True, return_lse=True, backend="triton", config=calls.SMALL)
    want = calls.forward(x)
    assert torch.equal(o, want.o) and torch.equal(lse, want.lse)
    if not x.q.is_cuda:
        assert launches[-2] == launches[-1]
