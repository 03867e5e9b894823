"""The Hopper backward against the oracle, and its protocol against mutants.

Without a GPU the Gluon kernel runs in the simulator (interpreter/gluon.py), the plain ones beside it interpreted. With
`-m gpu` the same bodies launch it on a GPU of capability 9.0. What it compiles to is asked in test_hopper_compiled.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from flash.kernels import hopper_backward
from flash.kernels.spec import Config, Configs, Gradients
from flash.problem import Problem
from tests import calls
from tests.bounds import Inputs, Outputs, check
from tests.calls import Place, random_inputs
from tests.interpreter.gluon import Simulated

Backward = Callable[..., Outputs]
KERNEL = hopper_backward.backward_kernel
ALL = Gradients(True, True, True)
PLAIN = Config(64, 64, 4, 1)  # of the kernels around the one under test


def launch(x: Inputs, needs: Gradients, slots: int, found: Outputs) -> Outputs:
    """Run the Hopper backward on what the forward found."""
    p = Problem.of(x.q, x.k, x.v, **x.options)
    assert hopper_backward.unserved(p.q, p.k, p.v, p.mods, p.spec, needs, False) is None
    configs = Configs(PLAIN, Config(64, 128, 8, slots), PLAIN)
    gradients = hopper_backward.backward(
        x.do, x.dlse, p.q, p.k, p.v, found.o, found.lse, p.mods, p.spec, p.scale, p.positions, configs, needs
    )
    return Outputs(found.o, found.lse, *gradients)


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Backward:
    """Run the plain forward, unless its outputs are given, and the Hopper backward; simulation: as Simulated takes."""
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of capability 9.0")

    def run(
        x: Inputs, needs: Gradients = ALL, slots: int = 2, found: Outputs | None = None, **simulation: Any
    ) -> Outputs:
        if device.type == "cpu":
            monkeypatch.setattr(hopper_backward, "backward_kernel", Simulated(KERNEL, **simulation))
        return launch(x, needs, slots, calls.forward(x, PLAIN) if found is None else found)

    return run


def one_head(place: Place, **options: Any) -> Inputs:
    return random_inputs(place, **{"heads": 1, "heads_k": 1, "head_dim": 64, "dtype": torch.float16, **options})


@pytest.mark.sampled(2)
@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_those_of_standard_attention(
    place: Place, backward: Backward, dtype: torch.dtype, head_dim: int, causal: bool
) -> None:
    x = one_head(place, seqlen_q=130, head_dim=head_dim, dtype=dtype, causal=causal)
    check(backward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 8), (40, 64), (72, 72), (96, 128)])
def test_a_narrower_head_is_filled_up_by_tma(place: Place, backward: Backward, head_dim: int, head_dim_v: int) -> None:
    x = one_head(place, seqlen_q=70, head_dim=head_dim, head_dim_v=head_dim_v, causal=True)
    check(backward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 130), (130, 1), (63, 65), (64, 128), (65, 129), (128, 64)])
def test_any_length_meets_any_length(
    place: Place, backward: Backward, seqlen_q: int, seqlen_k: int, causal: bool
) -> None:
    x = one_head(place, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
    check(backward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("window", [(40, 0), (0, 17), (3, 5), (None, 30), (100, None)])
def test_windows(place: Place, backward: Backward, window: Any) -> None:
    x = one_head(place, seqlen_q=130, window=window)
    check(backward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("q_offset", [-200, -40, 0, 31, 200, 2**40])
def test_a_causal_query_sees_the_keys_up_to_its_own_position(place: Place, backward: Backward, q_offset: int) -> None:
    x = one_head(place, seqlen_q=65, seqlen_k=50, causal=True, q_offset=q_offset)
    check(backward(x), x)


@pytest.mark.interpret
def test_the_position_may_be_a_tensor(place: Place, backward: Backward) -> None:
    q_offset = place(torch.tensor([5, -30], dtype=torch.int64))
    x = one_head(place, batch=2, seqlen_q=33, seqlen_k=40, causal=True, q_offset=q_offset)
    check(backward(x), x)


@pytest.mark.sampled(2)
@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, heads_k", [(4, 2), (3, 1)])
def test_a_key_head_gathers_the_gradients_of_its_group(
    place: Place, backward: Backward, heads: int, heads_k: int, causal: bool
) -> None:
    x = one_head(place, batch=2, heads=heads, heads_k=heads_k, seqlen_q=66, causal=causal)
    check(backward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"scale": -0.3}, {"scale": 0.05, "softcap": 1.0}])
def test_scores_in_natural_units(place: Place, backward: Backward, options: dict[str, float]) -> None:
    x = one_head(place, seqlen_q=70, causal=True, **options)
    check(backward(x), x)


@pytest.mark.interpret
def test_sinks_have_a_gradient(place: Place, backward: Backward) -> None:
    x = one_head(place, heads=2, heads_k=2, seqlen_q=70, causal=True, sinks=place(torch.randn(2)))
    check(backward(x, Gradients(True, True, True, sinks=True)), x)


@pytest.mark.interpret
def test_rows_without_keys_have_no_gradient(place: Place, backward: Backward) -> None:
    x = one_head(place, seqlen_q=130, seqlen_k=70, causal=True)
    got = backward(x)
    check(got, x)
    assert not got.dq[:, :, :60].any()


@pytest.mark.interpret
@pytest.mark.parametrize("lse_too", [False, True])
def test_gradients_of_o_need_not_be_dense(place: Place, backward: Backward, lse_too: bool) -> None:
    x = one_head(place, heads=2, heads_k=2, seqlen_q=66)
    do = place(torch.ones(1, 1, 1, 1, dtype=x.q.dtype)).expand(x.do.shape)
    x = x._replace(do=do, dlse=x.dlse if lse_too else None)
    check(backward(x), x)


@pytest.mark.interpret
def moved(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element past an address that 16 divides."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


@pytest.mark.interpret
def test_a_gradient_of_o_may_start_at_any_address(place: Place, backward: Backward) -> None:
    x = one_head(place, heads=2, heads_k=2, seqlen_q=66)
    check(backward(x._replace(do=moved(x.do))), x)


@pytest.mark.interpret(gpu=False)
def test_lse_may_lie_anywhere(device: torch.device) -> None:
    lse = torch.randn(1, 2, 64, device=device)
    for given in (moved(lse), torch.stack([lse, lse], 3)[..., 0]):
        described = hopper_backward.statistics(given)
        assert described.base.data_ptr() % 16 == 0 and described.shape == [128]
        assert torch.equal(described.base.flatten(), lse.flatten())


def test_strides_are_kept(place: Place, backward: Backward) -> None:
    x = one_head(place, batch=2, heads=3, heads_k=3, seqlen_q=66, causal=True)
    packed = place(torch.empty(2, 66, 3, 3, 64, dtype=x.q.dtype)).copy_(torch.stack(x[:3], 2).permute(0, 3, 2, 1, 4))
    q, k, v = (packed[:, :, n].transpose(1, 2) for n in range(3))
    got = backward(x._replace(q=q, k=k, v=v))
    check(got, x)
    assert got.dk.stride() == torch.empty_like(k).stride()


@pytest.mark.interpret
def test_dq_is_left_out_where_it_is_not_wanted(place: Place, backward: Backward) -> None:
    x = one_head(place, seqlen_q=130, causal=True)
    got = backward(x, Gradients(False, True, True))
    assert got.dq is None
    check(got, x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_order_of_events_changes_the_result(
    place: Place, backward: Backward, device: torch.device, slots: int, seed: int
) -> None:
    x = one_head(place, heads=2, seqlen_q=130, causal=True)
    found = calls.forward(x, PLAIN)
    got, again = backward(x, slots=slots, seed=seed, found=found), backward(x, slots=2, found=found)
    check(got, x)
    assert torch.equal(got.dk, again.dk) and torch.equal(got.dv, again.dv)


def planted(x: torch.Tensor, row: int, value: float) -> torch.Tensor:
    """x with one row of that value."""
    y = torch.empty_like(x).copy_(x)
    y[:, :, row] = value
    return y


def assert_untouched(got: Outputs, want: Outputs, rows: slice, keys: slice) -> None:
    """dq of these rows, and dk and dv of these keys, are what they would be without anything strange."""
    torch.testing.assert_close(got.dq[:, :, rows], want.dq[:, :, rows], rtol=1e-3, atol=1e-3)
    assert torch.equal(got.dk[:, :, keys], want.dk[:, :, keys]), "dk"
    assert torch.equal(got.dv[:, :, keys], want.dv[:, :, keys]), "dv"


STRANGE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("names", [("q",), ("do",), ("q", "do")])
def test_a_strange_query_stays_with_the_keys_it_sees(
    place: Place, backward: Backward, names: tuple[str, ...], strange: float
) -> None:
    x = one_head(place, seqlen_q=130, causal=True)
    row = 70
    got = backward(x._replace(**{name: planted(getattr(x, name), row, strange) for name in names}))
    want = backward(x._replace(**{name: planted(getattr(x, name), row, 1.0) for name in names}))
    assert_untouched(got, want, slice(0, row), slice(row + 1, None))
    assert_untouched(got, want, slice(row + 1, None), slice(row + 1, None))
    assert got.dk[:, :, :row].isnan().all() and got.dq[:, :, row].isnan().all()


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("names", [("k",), ("v",), ("k", "v")])
def test_a_strange_key_stays_with_the_queries_that_see_it(
    place: Place, backward: Backward, names: tuple[str, ...], strange: float
) -> None:
    x = one_head(place, seqlen_q=70, seqlen_k=130, causal=True, q_offset=0)
    row = 40
    got = backward(x._replace(**{name: planted(getattr(x, name), row, strange) for name in names}))
    want = backward(x._replace(**{name: planted(getattr(x, name), row, 1.0) for name in names}))
    assert_untouched(got, want, slice(0, row), slice(70, None))
    assert got.dq[:, :, row:].isnan().all()
    hidden = {name: planted(getattr(x, name), 100, strange) for name in names}  # from all queries
    assert_untouched(backward(x._replace(**hidden)), backward(x), slice(None), slice(None))


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(0, 2, 5, 64), (1, 2, 0, 64)])
def test_nothing_has_no_gradient(place: Place, backward: Backward, shape: tuple[int, ...]) -> None:
    q, k = place(torch.zeros(shape).half()), place(torch.zeros(shape[0], 2, 5, 64).half())
    got = backward(Inputs(q, k, k, q, q[..., 0].float()))
    assert got.dq.shape == q.shape and got.dk.shape == k.shape and not got.dk.any() and not got.dv.any()


MUTANTS = {
    "k and v are not awaited": ("consumer", "mbarrier.wait(bars.kv_full.index(me), 0)", "pass"),
    "q and do are not awaited": ("consumer", "mbarrier.wait(bars.full.index(slot), n // SLOTS & 1)", "pass"),
    "the wrong phase of them is awaited": ("consumer", "n // SLOTS & 1)", "n // SLOTS & 1 ^ 1)"),
    "q k is touched in flight": ("consumer", "warpgroup_mma_wait(1, deps=(qk,))", "warpgroup_mma_wait(2, deps=(qk,))"),
    "do v is touched in flight": ("consumer", "warpgroup_mma_wait(1, deps=(dp,))", "warpgroup_mma_wait(2, deps=(dp,))"),
    "a slot is released while dk reads it": (
        "consumer",
        "dv, dk = warpgroup_mma_wait(CONSUMERS, deps=(dv, dk))\n"
        "                mbarrier.arrive(bars.empty.index(slot), count=1)",
        "mbarrier.arrive(bars.empty.index(slot), count=1)\n"
        "                dv, dk = warpgroup_mma_wait(CONSUMERS, deps=(dv, dk))",
    ),
    "a slot is released before its statistics are read": (
        "consumer",
        "            delta_row = smem.delta",
        "            mbarrier.arrive(bars.empty.index(slot), count=1)\n            delta_row = smem.delta",
    ),
    "dx is overwritten while dq reads it": ("consumer", "mbarrier.wait(bars.dx_empty, n & 1 ^ 1)", "pass"),
    "dx is released while dq reads it": (
        "consumer",
        "dq_part = warpgroup_mma_wait(0, deps=(dq_part,))\n                mbarrier.arrive(bars.dx_empty, count=1)",
        "mbarrier.arrive(bars.dx_empty, count=1)\n                dq_part = warpgroup_mma_wait(0, deps=(dq_part,))",
    ),
    "dx of the other consumer is not awaited": ("consumer", "mbarrier.wait(bars.dx_full, n & 1)", "pass"),
    "dx is not announced": ("consumer", "mbarrier.arrive(bars.dx_full, count=1)", "pass"),
    "dx is not fenced": (
        "consumer",
        "smem.dx.index(me + zero).store(dx)\n                fence_async_shared()",
        "smem.dx.index(me + zero).store(dx)",
    ),
    "finite q and do are not fenced": (
        "consumer",
        "copy_finite(do_share, do_share)\n                fence_async_shared()",
        "copy_finite(do_share, do_share)",
    ),
    "finite q and do of the other consumer are not awaited": (
        "consumer",
        "mbarrier.wait(bars.finite, edges & 1)",
        "pass",
    ),
    "dk and dv are not fenced": (
        "consumer",
        "smem.v.index(me).reshape([ROWS, D]).store(dv.to(dtype))\n    fence_async_shared()",
        "smem.v.index(me).reshape([ROWS, D]).store(dv.to(dtype))",
    ),
    "dk and dv are not stored to the end": ("consumer", "tma.store_wait(0)", "pass"),
    "the producer ignores that a slot is in use": (
        "producer",
        "mbarrier.wait(bars.empty.index(slot), n // SLOTS & 1 ^ 1)",
        "pass",
    ),
    "the producer awaits the wrong phase": ("producer", "& 1 ^ 1)", "& 1)"),
    "the producer expects too few bytes": ("producer", " + lse_desc.block_type.nbytes", ""),
    "delta lands in another slot": ("producer", "smem.delta.index(slot)", "smem.delta.index(0)"),
    "one consumer releases a slot for both": (
        "backward_kernel",
        "mbarrier.init(bars.empty.index(i), count=CONSUMERS)",
        "mbarrier.init(bars.empty.index(i), count=1)",
    ),
    "one consumer announces dx for both": (
        "backward_kernel",
        "mbarrier.init(bars.dx_full, count=CONSUMERS)",
        "mbarrier.init(bars.dx_full, count=1)",
    ),
    "masked tiles are not masked": ("consumer", "p = gl.where(keep, p", "p = gl.where(keep | True, p"),
    "dq of a tile lands in the next": ("consumer", ".to(gl.int64) * D +", ".to(gl.int64) * D + D +"),
    "what hidden queries hold reaches dk and dv": (
        "copy_finite",
        "tile.finite(source.load(LAYOUT))",
        "source.load(LAYOUT)",
    ),
    "a group's heads are one": ("following", "h + 1", "h"),
    "dq of every batch element is added to the first": (
        "consumer",
        "tile.origin(walk.dq, walk.b, h)",
        "tile.origin(walk.dq, walk.b * 0, h)",
    ),
    "lse and delta are those of the first batch element": (
        "producer",
        "walk.b * sizes.heads",
        "walk.b * 0 * sizes.heads",
    ),
    "finite q and do are awaited by the count of all tiles": (
        "consumer",
        "mbarrier.wait(bars.finite, edges & 1)",
        "mbarrier.wait(bars.finite, n & 1)",
    ),
}


@pytest.fixture(scope="module")
def case() -> tuple[Inputs, Outputs]:
    """A call whose tiles are full, cut by the diagonal and ragged, twice around the ring, and its gradients.

    An odd number of full tiles lies before the others. Query 3 holds a NaN and sees only the first keys.
    """
    torch.manual_seed(0)
    x = one_head(lambda t: t, batch=2, heads=3, seqlen_q=200, seqlen_k=130, causal=True, q_offset=0)
    x = x._replace(do=planted(x.do, 3, float("nan")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_backward, "backward_kernel", Simulated(KERNEL))
        return x, launch(x, ALL, 2, calls.forward(x, PLAIN))


def caught(backward: Backward, case: tuple[Inputs, Outputs], edits: list[tuple[str, str, str]]) -> bool:
    """Whether an edited kernel fails or finds something else, events coming in turn or in some other order."""
    x, want = case
    for seed in (None, 0, 1, 2, 3):  # in turn finds most
        try:
            got = backward(x, found=want, seed=seed, edits=edits)
        except (AssertionError, TimeoutError, IndexError):
            return True
        for gradient in ("dk", "dv"):
            if not torch.equal(*(getattr(outputs, gradient).nan_to_num(9.0) for outputs in (got, want))):
                return True
        if not torch.allclose(got.dq, want.dq, rtol=1e-2, atol=1e-2, equal_nan=True):  # its sums have no order
            return True
    return False


@pytest.mark.sampled(4, all=True)
@pytest.mark.interpret(gpu=False)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(backward: Backward, case: tuple[Inputs, Outputs], name: str) -> None:
    assert caught(backward, case, [MUTANTS[name]])


@pytest.mark.interpret(gpu=False)
def test_the_kernel_itself_is_not(backward: Backward, case: tuple[Inputs, Outputs]) -> None:
    assert not caught(backward, case, [])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dk_and_dv_repeat_bit_for_bit_and_dq_nearly(
    place: Place, backward: Backward, head_dim: int, causal: bool
) -> None:
    x = random_inputs(
        place, heads=8, heads_k=2, seqlen_q=1000, seqlen_k=1000, head_dim=head_dim, dtype=torch.bfloat16, causal=causal
    )
    found = calls.forward(x, PLAIN)
    first = backward(x, found=found)
    for _ in range(50):
        again = backward(x, found=found)
        assert torch.equal(again.dk, first.dk) and torch.equal(again.dv, first.dv)
        # atomics add in any order: an ulp of bfloat16 where a sum lies between two numbers
        torch.testing.assert_close(again.dq, first.dq, rtol=2**-7, atol=1e-3)


def reason(needs: Gradients = ALL, deterministic: bool = False, **options: Any) -> str | None:
    sizes = {"head_dim": 64, "dtype": torch.float16, **options}
    x = random_inputs(lambda t: t, seqlen_q=5, **sizes)
    p = Problem.of(x.q, x.k, x.v, **x.options)
    return hopper_backward.unserved(p.q, p.k, p.v, p.mods, p.spec, needs, deterministic)


@pytest.mark.parametrize(
    "word, options",
    [
        ("float32", {"dtype": torch.float32}),
        ("head_dim 256", {"head_dim": 256}),
        ("head_dim 64 and head_dim_v 128", {"head_dim_v": 128}),
        ("no multiple of 8", {"head_dim": 36}),
        ("softcap", {"head_dim": 128, "softcap": 30.0}),
        ("deterministic", {"deterministic": True}),
        ("not asked for", {"needs": Gradients(True, True, False)}),
        ("not asked for", {"needs": Gradients(True, False, False)}),
        ("a bias", {"bias": torch.zeros(5, 5)}),
        ("a mask", {"mask": torch.ones(5, 5, dtype=torch.bool)}),
        ("ALiBi", {"alibi_slopes": torch.ones(2)}),
        ("dropout", {"dropout_p": 0.5}),
    ],
)
def test_what_is_not_served_is_said(word: str, options: dict[str, Any]) -> None:
    assert word in (reason(**options) or "nothing")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": (3, 0), "head_dim": 128, "head_dim_v": 72},
        {"softcap": 3.0, "sinks": torch.zeros(2)},
        {"needs": Gradients(False, True, True), "deterministic": True},
        {"q_offset": torch.tensor(2)},
    ],
)
def test_what_is_served(options: dict[str, Any]) -> None:
    assert reason(**options) is None


def test_another_config_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"config\['dkdv'\].block_m must be one of \(64,\), got 128"):
        hopper_backward.options_of(Config(128, 128, 8, 2))
