"""The Hopper forward against the oracle: simulated on a CPU, launched by `-m gpu` on a GPU of capability 9.0.

Simulated, every tile, barrier and product of the kernel is the real one and only the machine is not
(interpreter/gluon.py); mutants of the protocol show that it would see them go wrong. The same bodies launch the
compiled kernel on a GPU. What it compiles to is asked in test_hopper_compiled.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from flash.kernels import hopper_forward
from flash.kernels.spec import Config, Positions
from flash.problem import Problem
from tests import calls
from tests.bounds import Inputs, Outputs, check, complaints, oracle
from tests.calls import Place, random_inputs
from tests.interpreter.gluon import Simulated

SMALL = Config(128, 32, 8, 2)
THREE = Config(192, 64, 12, 3)
KERNEL = hopper_forward.forward_kernel

Forward = Callable[..., Outputs]


def call(x: Inputs, config: Config = SMALL) -> Outputs:
    p = Problem.of(x.q, x.k, x.v, **x.options)
    assert hopper_forward.unserved(p.q, p.k, p.v, p.mods, p.spec) is None
    return Outputs(*hopper_forward.forward(p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions, config))


@pytest.fixture
def forward(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forward]:
    """(inputs, config) -> outputs of the kernel, simulated or on the GPU."""
    if device.type == "cpu":
        monkeypatch.setattr(hopper_forward, "forward_kernel", Simulated(KERNEL))
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of capability 9.0")
    yield call


def inputs(place: Place, **options: Any) -> Inputs:
    """Half precision, and three query tiles of 128 unless lengths are given."""
    return random_inputs(place, **{"dtype": torch.bfloat16, "head_dim": 64, "seqlen_q": 130, **options})


@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_those_of_standard_attention(
    place: Place, forward: Forward, dtype: torch.dtype, head_dim: int, causal: bool
) -> None:
    x = inputs(place, seqlen_k=150, head_dim=head_dim, dtype=dtype, causal=causal, sigma=2.0)
    check(forward(x), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [1, 32, 37, 128, 150])
@pytest.mark.parametrize("seqlen_q", [1, 64, 113, 200])
def test_every_length_meets_every_length(
    place: Place, forward: Forward, seqlen_q: int, seqlen_k: int, causal: bool
) -> None:
    x = inputs(place, heads_k=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
    check(forward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("q_offset", [-200, -70, -1, 0, 5, 31, 32, 64, 200, 2**40, -(2**40)])
def test_a_causal_query_sees_the_keys_up_to_its_own_position(place: Place, forward: Forward, q_offset: int) -> None:
    x = inputs(place, seqlen_k=100, causal=True, q_offset=q_offset)
    check(forward(x), x)


@pytest.mark.interpret
def test_the_position_may_be_a_tensor(place: Place, forward: Forward) -> None:
    q_offset = place(torch.tensor([7, -200, 2**40]))
    x = inputs(place, batch=3, seqlen_q=70, seqlen_k=90, causal=True, q_offset=q_offset)
    check(forward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (3, 5), (40, None), (None, 20), (70, 64), (500, 500)])
def test_a_window_shows_the_keys_around_a_query(
    place: Place, forward: Forward, window: tuple[int | None, int | None], causal: bool
) -> None:
    x = inputs(place, seqlen_k=160, causal=causal, window=window)
    check(forward(x), x)


@pytest.mark.interpret
def test_a_window_far_from_the_keys_shows_none(place: Place, forward: Forward) -> None:
    x = inputs(place, seqlen_k=100, window=(5, 5), q_offset=80)
    got = forward(x)
    check(got, x)
    assert (got.o[:, :, 30:] == 0).all() and (got.lse[:, :, 30:] == float("-inf")).all()


@pytest.mark.interpret
@pytest.mark.parametrize("heads, heads_k", [(4, 2), (6, 2), (3, 1)])
def test_groups_of_query_heads_share_a_key_head(place: Place, forward: Forward, heads: int, heads_k: int) -> None:
    x = inputs(place, batch=2, heads=heads, heads_k=heads_k, seqlen_q=70, causal=True)
    check(forward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("heads, heads_k", [(5, 5), (6, 2)])
def test_heads_are_taken_by_sections_and_none_is_left_out(
    place: Place, forward: Forward, monkeypatch: pytest.MonkeyPatch, heads: int, heads_k: int
) -> None:
    x = inputs(place, heads=heads, heads_k=heads_k, seqlen_q=140, causal=True)
    monkeypatch.setattr(hopper_forward, "RESIDENT", 2 * 140 * 128 * 2)  # of two key heads
    assert hopper_forward.section(x.q, x.k, x.v) == 2 * heads // heads_k
    check(forward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "head_dim, head_dim_v", [(8, 8), (40, 40), (64, 24), (96, 96), (80, 128), (136, 136), (200, 256)]
)
def test_a_head_may_be_narrower_than_its_tile(place: Place, forward: Forward, head_dim: int, head_dim_v: int) -> None:
    x = inputs(place, head_dim=head_dim, head_dim_v=head_dim_v, causal=True)
    check(forward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("config", [THREE, Config(128, 64, 8, 1), Config(128, 32, 8, 4), Config(128, 128, 8, 2)])
@pytest.mark.parametrize("seqlen_k", [150, 256])
def test_any_tile_and_ring(place: Place, forward: Forward, config: Config, seqlen_k: int) -> None:
    x = inputs(place, seqlen_q=200, seqlen_k=seqlen_k, causal=True)
    check(forward(x, config), x)


@pytest.mark.interpret
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0, 1.0])
def test_scores_are_scaled_and_capped(
    place: Place, forward: Forward, scale: float | None, softcap: float | None
) -> None:
    x = inputs(place, causal=True, scale=scale, softcap=softcap)
    check(forward(x), x)


@pytest.mark.interpret
@pytest.mark.parametrize("q_offset", [0, -70])
def test_a_sink_takes_its_share(place: Place, forward: Forward, q_offset: int) -> None:
    sinks = place(torch.tensor([2.0, -1.0, float("-inf")]))
    x = inputs(place, heads=3, heads_k=1, causal=True, q_offset=q_offset, sinks=sinks)
    check(forward(x), x)


@pytest.mark.interpret
def test_rows_without_keys_return_zero_and_minus_infinity(place: Place, forward: Forward) -> None:
    got = forward(inputs(place, causal=True, q_offset=-70))
    assert (got.o[:, :, :70] == 0).all() and (got.lse[:, :, :70] == float("-inf")).all()
    assert got.o[:, :, 70:].any(-1).all() and got.lse[:, :, 70:].isfinite().all()


@pytest.mark.interpret
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0, "heads_k": 0}, {"seqlen_q": 0, "seqlen_k": 9}])
def test_without_batch_heads_or_queries_there_is_nothing_to_do(
    place: Place, forward: Forward, sizes: dict[str, int]
) -> None:
    x = inputs(place, **sizes)
    got = forward(x)
    assert got.o.shape == x.q.shape and got.lse.shape == x.q.shape[:3]


@pytest.mark.interpret
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bad_query_row_stays_alone(place: Place, forward: Forward, poison: float, causal: bool) -> None:
    x = inputs(place, heads=1, heads_k=1, causal=causal)
    clean = oracle(x)
    x.q[0, 0, 20, 3] = poison
    got = forward(x)
    assert poison == poison or got.o[0, 0, 20].isnan().all() and got.lse[0, 0, 20].isnan()
    others = torch.arange(130) != 20
    error = (got.o.double() - clean.o)[:, :, others].abs().max()
    assert error < 0.02 and got.lse[:, :, others].isfinite().all()


HIDDEN = {
    "after the diagonal": {"causal": True, "q_offset": 0},
    "before any query's position": {"causal": True, "q_offset": -40},
    "outside a window": {"window": (9, 3)},
    "left of a causal window": {"causal": True, "window": (20, None)},
}


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_bad_key_reaches_only_the_rows_that_see_it(
    place: Place, forward: Forward, hidden: str, poison: float, head_dim: int
) -> None:
    x = inputs(place, heads=1, heads_k=1, seqlen_q=80, seqlen_k=100, head_dim=head_dim, **HIDDEN[hidden])
    clean = forward(x)
    x.k[0, 0, 30, 3] = float("nan")
    x.v[0, 0, 31] = poison
    x.v[0, 0, 47, 5] = poison
    got, want = forward(x), oracle(x)
    assert torch.equal(got.o.isfinite(), want.o.isfinite())
    seen = want.o.isfinite()
    error = (got.o.double() - clean.o.double()).where(seen, 0.0).abs().max()
    assert error <= 2 * torch.finfo(x.q.dtype).eps * clean.o.abs().max()  # other sums of the same terms
    rows = want.lse.isfinite()
    assert torch.equal(got.lse.where(rows, 0.0), clean.lse.where(rows, 0.0))


@pytest.mark.interpret
@pytest.mark.parametrize("seqlen_q, q_offset", [(20, 0), (33, -3), (1, 30), (128, -70)])
def test_keys_that_no_query_sees_never_show(place: Place, forward: Forward, seqlen_q: int, q_offset: int) -> None:
    x = inputs(place, heads=1, heads_k=1, seqlen_q=seqlen_q, seqlen_k=90, causal=True, q_offset=q_offset)
    k, v = x.k.clone(), x.v.clone()
    for t in (k, v):
        t[:, :, max(seqlen_q + q_offset, 0) :] = float("nan")
    check(forward(x._replace(k=place(k), v=place(v))), x)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["batch, seqlen, heads, head_dim", "a slice of packed q, k and v"])
def test_strides_change_no_bit(place: Place, forward: Forward, kind: str) -> None:
    sizes = {"batch": 2, "heads": 2, "heads_k": 2, "seqlen_q": 70, "seqlen_k": 90, "head_dim": 24}
    x = inputs(place, **sizes, causal=True)
    want = forward(x)
    for name in ("q", "k", "v"):
        t = getattr(x, name)
        view = calls.strided(place, tuple(t.shape), t.dtype)[kind]
        got = forward(x._replace(**{name: view.copy_(t)}))
        assert torch.equal(got.o, want.o) and torch.equal(got.lse, want.lse), name


@pytest.mark.interpret
def test_the_output_is_dense_in_the_querys_axis_order(place: Place, forward: Forward) -> None:
    x = inputs(place, batch=2, heads=3, heads_k=3, seqlen_q=5, head_dim=24, head_dim_v=40)
    got = forward(x._replace(q=x.q.transpose(1, 2).contiguous().transpose(1, 2)))
    assert got.o.transpose(1, 2).is_contiguous() and got.lse.is_contiguous()
    check(got, x)


@pytest.mark.interpret(gpu=False)  # the order of threads is the simulator's
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("config", [SMALL, THREE])
def test_any_order_of_warps_and_copies_gives_the_same_bits(
    place: Place, forward: Forward, monkeypatch: pytest.MonkeyPatch, config: Config, seed: int
) -> None:
    x = inputs(place, seqlen_k=150, heads=1, heads_k=1, causal=True)
    want = forward(x, config)
    monkeypatch.setattr(hopper_forward, "forward_kernel", Simulated(KERNEL, seed=seed))
    got = forward(x, config)
    assert torch.equal(got.o, want.o) and torch.equal(got.lse, want.lse)


def swapped(first: str, second: str, indent: int = 12) -> tuple[str, str]:
    """Two statements, and the same in the other order."""
    between = "\n" + " " * indent
    return first + between + second, second + between + first


ACC = "acc = warpgroup_mma_wait(0, deps=(acc,))"
SCORES = "qk = warpgroup_mma_wait(1, deps=(qk,))"
RELEASE_K = "mbarrier.arrive(k_empty.index(slot), count=1)"
RELEASE_V = "mbarrier.arrive(v_empty.index(last), count=1)"
AWAIT_K = "mbarrier.wait(k_full.index((j + 1) % SLOTS), ((j + 1) // SLOTS) & 1, pred=j + 1 < partial + full)"
AWAIT_V = "mbarrier.wait(v_full.index(last), ((j - 1) // SLOTS) & 1)"
AWAIT_LAST = "mbarrier.wait(v_full.index(last), ((partial + full - 1) // SLOTS) & 1)"
PRODUCT = "acc = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, DV]), acc, is_async=True)\n            qk"
RESCALE = "acc = acc * gl.convert_layout(alpha, O_ROW_LAYOUT)[:, None]\n            p ="

MUTANTS = {  # what is done to the source of a function
    "V is released before its product is done": ("consumer", *swapped(ACC, RELEASE_V)),
    "K is not awaited": ("consumer", AWAIT_K, "pass"),
    "K is awaited in the wrong phase": ("consumer", AWAIT_K, AWAIT_K.replace("((j + 1) //", "(j //")),
    "K is awaited in the wrong slot": ("consumer", AWAIT_K, AWAIT_K.replace("(j + 1) % SLOTS", "j % SLOTS")),
    "V is not awaited": ("consumer", AWAIT_V, "pass"),
    "V is awaited in the wrong phase": ("consumer", AWAIT_V, AWAIT_V.replace("(j - 1)", "j")),
    "the last V is not awaited": ("consumer", AWAIT_LAST, "pass"),
    "scores are read too early": ("consumer", SCORES, SCORES.replace("wait(1", "wait(2")),
    "acc is read too early": (
        "consumer", f"{ACC}\n            {RELEASE_V}", f"{ACC.replace('wait(0', 'wait(1')}\n            {RELEASE_V}",
    ),
    "the last product is not awaited": ("consumer", f"{ACC}\n\n    weight", "pass\n\n    weight"),
    "K is never released": ("consumer", f"{SCORES}\n            {RELEASE_K}", SCORES),
    "V is never released": ("consumer", RELEASE_V, "pass"),
    "V is released twice": ("consumer", RELEASE_V, RELEASE_V.replace("=1", "=2")),
    "V is read from another slot": ("consumer", PRODUCT, PRODUCT.replace("index(last)", "index(slot)")),
    "the queries are not awaited": ("consumer", "mbarrier.wait(q_full.index(me), 0)", "pass"),
    "o leaves without a fence": ("consumer", "fence_async_shared()", "pass"),
    "o is not awaited": ("consumer", "tma.store_wait(0)", "pass"),
    "acc is not rescaled": ("consumer", RESCALE, "p ="),
    "the producer ignores that K is in use": ("producer", "mbarrier.wait(k_empty.index(slot), phase ^ 1)", "pass"),
    "the producer ignores that V is in use": ("producer", "mbarrier.wait(v_empty.index(slot), phase ^ 1)", "pass"),
    "the producer awaits the wrong phase": ("producer", "k_empty.index(slot), phase ^ 1", "k_empty.index(slot), phase"),
    "the producer expects too few bytes": ("producer", "index(slot), k_desc.block_type.nbytes", "index(slot), 64"),
    "the producer loads the same tile again": ("producer", "col, 0], v_full", "0, 0], v_full"),
    "the producer forgets the tiles at the edges": ("producer", "before = count", "before = 0"),
}  # fmt: skip


def mutated(place: Place, monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str, str]) -> list[str]:
    """What is wrong with the call of a mutant."""
    monkeypatch.setattr(hopper_forward, "forward_kernel", Simulated(KERNEL, edits=[edit]))
    x = inputs(place, heads=1, heads_k=1, seqlen_q=128, seqlen_k=290, causal=True)
    try:
        return complaints(call(x), x)
    except (AssertionError, TimeoutError) as error:
        return [str(error)]


@pytest.mark.interpret(gpu=False)  # they hang or fault there, or happen to be right
@pytest.mark.parametrize("edit", MUTANTS.values(), ids=list(MUTANTS))
def test_an_error_of_protocol_shows(place: Place, monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str, str]) -> None:
    assert mutated(place, monkeypatch, edit), "nothing to be seen of the mutant"


@pytest.mark.interpret(gpu=False)
def test_k_released_early_is_harmless_while_v_orders_the_ring(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # A slot's next K is loaded after the producer has awaited V of the tile before this K's, which is released after
    # this K was read. So nothing can be seen, on a GPU either, as long as one producer loads both.
    edit = swapped(SCORES, RELEASE_K)
    assert mutated(place, monkeypatch, ("consumer", *edit)) == []


def served(x: Inputs) -> str | None:
    p = Problem.of(x.q, x.k, x.v, **x.options)
    return hopper_forward.unserved(p.q, p.k, p.v, p.mods, p.spec)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 257}, "head_dim 257"),
        ({"head_dim": 64, "head_dim_v": 128}, "head_dim_v 128"),
        ({"head_dim": 60}, "no multiple of 8"),
        ({"seqlen_k": 0}, "no key"),
        ({"mask": torch.ones(130, 130, dtype=torch.bool)}, "a mask"),
        ({"bias": torch.zeros(130, 130)}, "a bias"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"dropout_p": 0.5}, "dropout"),
    ],
)
def test_what_is_not_served_has_its_reason(options: dict[str, Any], word: str) -> None:
    assert word in (served(inputs(lambda x: x, **options)) or "served")


def test_what_tma_cannot_address_has_its_reason() -> None:
    x = inputs(lambda x: x, batch=2, seqlen_q=20)
    views = calls.strided(lambda x: x, tuple(x.k.shape), x.k.dtype)
    served_kinds = {kind for kind, k in views.items() if served(x._replace(k=k)) is None}
    assert served_kinds == {"batch, seqlen, heads, head_dim", "a slice of packed q, k and v"}
    assert "innermost" in (served(x._replace(k=views["seqlen innermost"])) or "")
    assert "stride of 1300" in (served(x._replace(k=views["padded rows"])) or "")
    assert "address" in (served(x._replace(k=views["one element into the allocation"])) or "")
    assert "stride of 0" in (served(x._replace(k=x.k[:, :1].expand(-1, 2, -1, -1))) or "")


@pytest.mark.parametrize(
    "config, message",
    [
        (Config(64, 64, 4, 2), r"config.block_m must be one of \(128, 192\), got 64"),
        (Config(128, 64, 4, 2), r"config.num_warps must be one of \(8, 12\), got 4"),
        (Config(192, 64, 8, 2), "config must have 16 queries a warp, block_m 128 or 192, got .*block_m=192"),
        (Config(128, 48, 8, 2), r"config.block_n must be one of \(16, .*\), got 48"),
    ],
)
def test_a_configuration_of_other_kernels_is_refused(config: Config, message: str) -> None:
    p = Problem.of(*inputs(lambda x: x)[:3])
    with pytest.raises(ValueError, match=message):
        hopper_forward.forward(p.q, p.k, p.v, p.mods, p.spec, p.scale, Positions(), config)
