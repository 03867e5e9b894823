"""Windows: the very keys that each query sees, what it never sees, and the tiles that are never loaded."""

import itertools
from typing import Any

import pytest
import torch

from tests import calls, features
from tests.bounds import check
from tests.calls import CONFIGS, Place, random_inputs
from tests.features import Sizes

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
Side = int | None
LENGTHS = [(18, 18), (9, 18), (18, 9), (18, 33)]
EDGES = [(0, 0), (0, 5), (5, 0), (3, 3), (7, 2), (None, 2), (2, None), (31, 31), (15, 16), (None, None)]


def band(seqlen_q: int, seqlen_k: int, offset: int, left: Side, right: Side, causal: bool = False) -> torch.Tensor:
    """Which keys each query sees, pair by pair: bool [seqlen_q, seqlen_k]."""

    def sees(i: int, j: int) -> bool:
        far = j - (i + offset)
        return (left is None or far >= -left) and (right is None or far <= right) and (not causal or far <= 0)

    return torch.tensor([[sees(i, j) for j in range(seqlen_k)] for i in range(seqlen_q)], dtype=torch.bool)


def window_of(left: Side, right: Side) -> Any:
    """The keyword, as an int where both sides are alike."""
    return left if left == right else (left, right)


@pytest.mark.sampled(16)
@BOTH
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS)
def test_the_support_of_each_row_is_the_window_s(
    place: Place, backend: str, seqlen_q: int, seqlen_k: int, causal: bool, every: bool
) -> None:
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=1)
    q, k, v = x.q, x.k, place(torch.eye(seqlen_k)[None, None])  # a row of o is then the row of weights
    call = features.attention(backend)
    sides = [None, 0, 1, 2, 8, 15, 16, 17, seqlen_k, seqlen_k + 1]
    if every:
        sides = [None, *range(max(seqlen_q, seqlen_k) + 2)]
    for left, right in itertools.product(sides, sides):
        o, _ = call(q, k, v, window=window_of(left, right), causal=causal)
        want = band(seqlen_q, seqlen_k, seqlen_k - seqlen_q, left, right, causal)
        assert torch.equal((o[0, 0] > 0).cpu(), want), (left, right)


@pytest.mark.sampled(18)
@BOTH
@pytest.mark.parametrize("q_offset", [-40, -7, 0, 11, 60, 2**40, torch.tensor([3, -9])], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_moves_with_the_position(place: Place, backend: str, q_offset: Any, causal: bool) -> None:
    q_offset = place(q_offset) if isinstance(q_offset, torch.Tensor) else q_offset
    for left, right in EDGES[1::3]:
        x = random_inputs(
            place, batch=2, seqlen_q=33, seqlen_k=50, dtype=torch.float64,
            causal=causal, q_offset=q_offset, window=window_of(left, right),
        )  # fmt: skip
        check(features.run(x, backend), x)


SIZES = [(20, 50), (50, 20), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((40, 40), (1, 50)))]


@pytest.mark.sampled(6)
@BOTH
@pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES)
@pytest.mark.parametrize("left, right", EDGES)
def test_gradients_under_a_window(
    place: Place, backend: str, seqlen_q: int, seqlen_k: int, left: Side, right: Side
) -> None:
    x = random_inputs(
        place, heads=2, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=16, dtype=torch.float64,
        causal=left == right, window=(left, right),
    )  # fmt: skip
    check(features.run(x, backend), x)


@pytest.mark.sampled(3, all=True)
@BOTH
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("left, right, q_offset", [(3, 2, 20), (0, 0, 16), (5, 0, 0), (0, 9, 40), (70, None, 90)])
def test_keys_outside_every_window_never_show(
    place: Place, backend: str, left: Side, right: Side, q_offset: int, poison: float
) -> None:
    seqlen_q, seqlen_k = 13, 60
    x = random_inputs(
        place, seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=torch.float64, window=(left, right), q_offset=q_offset
    )
    clean = features.run(x, backend)
    unseen = ~band(seqlen_q, seqlen_k, q_offset, left, right).any(0)
    assert unseen.any()
    for t in (x.k, x.v):
        t[:, :, unseen.to(t.device)] = poison
    got = features.run(x, backend)
    for name, a, b in zip(got._fields, got, clean, strict=True):
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


@BOTH
def test_a_bad_key_reaches_only_the_queries_whose_window_holds_it(place: Place, backend: str) -> None:
    x = random_inputs(place, seqlen_q=63, seqlen_k=63, dtype=torch.float64, window=(5, 3))
    clean = features.run(x, backend)
    for name in ("k", "v"):
        getattr(x, name)[:, :, 30] = float("nan")
    got = features.run(x, backend)
    sees = band(63, 63, 0, 5, 3)[:, 30].to(got.o.device)
    assert got.o[:, :, sees].isnan().all()
    for name in ("o", "lse", "dq"):
        a, b = (getattr(t, name)[:, :, ~sees] for t in (got, clean))
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


@BOTH
def test_an_int_is_a_window_of_as_much_on_both_sides(place: Place, backend: str) -> None:
    x = random_inputs(place, seqlen_q=33, dtype=torch.float64, window=4)
    pair = x._replace(options={"window": (4, 4)})
    assert torch.equal(features.run(x, backend).o, features.run(pair, backend).o)


@BOTH
def test_with_causal_nothing_after_the_query_is_seen(place: Place, backend: str) -> None:
    x = random_inputs(place, seqlen_q=33, dtype=torch.float64, window=(4, 9), causal=True)
    left = x._replace(options={"window": (4, 0)})
    got, want = features.run(x, backend), features.run(left, backend)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.sampled(3, all=True)
@BOTH
@pytest.mark.parametrize("window", [2**31, (2**40, 3), (3, 2**62)])
def test_a_window_beyond_32_bits_is_a_wide_one(place: Place, backend: str, window: Any) -> None:
    for q_offset in (-40, 0, 40):
        x = random_inputs(place, seqlen_q=33, seqlen_k=50, dtype=torch.float64, window=window, q_offset=q_offset)
        check(features.run(x, backend), x)


def counted(x: calls.Inputs, launches: list[Any], visible: torch.Tensor) -> None:
    """Hold the dots and the loads of all three kernels to the tiles in which somebody sees something."""
    calls.backward(x)
    assert [launch.kernel for launch in launches[-3:]] != []
    found = {launch.kernel: launch for launch in launches}
    for kernel, config, dots in (("forward", CONFIGS.forward, 2), ("dkdv", CONFIGS.dkdv, 4), ("dq", CONFIGS.dq, 3)):
        (launch,) = (launch for name, launch in found.items() if name.startswith(kernel))
        assert launch.dots == dots * calls.visible_tiles(visible, config.block_m, config.block_n), kernel


@pytest.mark.sampled(6)
@pytest.mark.interpret(gpu=False)  # the interpreter counts the work
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left, right", EDGES[::2])
@pytest.mark.parametrize("seqlen_q, seqlen_k, q_offset", [(63, 63, 0), (33, 60, 27), (60, 33, -27), (40, 40, 40)])
def test_tiles_outside_the_window_are_never_visited(
    place: Place,
    launches: list[Any],
    seqlen_q: int,
    seqlen_k: int,
    q_offset: int,
    left: Side,
    right: Side,
    causal: bool,
) -> None:
    x = random_inputs(
        place, heads=1, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=16,
        causal=causal, window=(left, right), q_offset=q_offset,
    )  # fmt: skip
    counted(x, launches, band(seqlen_q, seqlen_k, q_offset, left, right, causal))


@pytest.mark.sampled(24)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [(7, 7), (20, 0), (None, 5)], ids=str)
def test_errors_are_those_of_standard_attention(place: Place, backend: str, dtype: torch.dtype, window: Any) -> None:
    x = features.call_of(place, ["groups"], Sizes(seqlen_q=113, seqlen_k=120, head_dim=64, head_dim_v=64), dtype)
    x.options["window"] = window
    check(features.run(x, backend), x)
