"""Parts of a call come together to what the whole gives, whatever it asks for and wherever it is cut."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from flash import dispatch, mods, ops
from flash.kernels.spec import Config, Gradients, Mods, Spans, Spec
from flash.merge import merge
from flash.parts import Extent, Extents, columns, mod_of_part, starting
from flash.problem import Problem
from flash.twins import MaskMod
from tests.bounds import Inputs, Outputs, check
from tests.calls import Place, random_inputs
from tests.features import Sizes, bent_derivative, bent_score, bent_twin, make_block_mask, sieve, sieve_twin
from tests.parts import Piece, Pieces, band_of, gradients, together, whole_of

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]
BATCH, HEADS, HEADS_K, SEQLEN_Q, SEQLEN_K = 2, 2, 1, 21, 27
TOTAL_Q, TOTAL_K = 22, 30  # packed
SIZES = Sizes(BATCH, HEADS, HEADS_K, SEQLEN_Q, SEQLEN_K)
Options = dict[str, Any]


def ids(length: int) -> torch.Tensor:
    """Three documents of each sequence, [BATCH, length]."""
    return torch.stack([torch.arange(length) * 3 // length, (torch.arange(length) * 3 + 20) // length])


def bent(place: Place) -> Options:
    args = place(torch.linspace(-0.2, 0.3, 2 * HEADS).double()), place(torch.tensor([0.05]).double())
    return {"score_mod": mods.ScoreMod(bent_score, bent_twin, bent_derivative, args)}


def sieved(place: Place) -> Options:
    return {"mask_mod": MaskMod(sieve, sieve_twin, (place(torch.tensor([2], dtype=torch.int32)),))}


def half_hidden(*shape: int) -> torch.Tensor:
    """A bias some of whose elements hide their key."""
    bias = torch.randn(shape).double()
    return bias.masked_fill(torch.rand(shape) < 0.2, float("-inf"))


CASES: dict[str, Callable[[Place], Options]] = {
    "plain": lambda place: {},
    "causal": lambda place: {"causal": True},
    "window": lambda place: {"window": (5, 3)},
    "causal from a position": lambda place: {"causal": True, "q_offset": 3, "window": (11, None)},
    "positions of each": lambda place: {"window": (9, 2), "q_offset": place(torch.tensor([-4, 2**40]))},
    "positions of each, int32": lambda place: {"causal": True, "q_offset": place(torch.tensor([12, -(2**31)]).int())},
    "mask": lambda place: {"mask": place(torch.rand(BATCH, 1, SEQLEN_Q, SEQLEN_K) < 0.6)},
    "padding": lambda place: {"mask": place((torch.arange(SEQLEN_K) < torch.tensor([[7], [24]]))[:, None, None])},
    "bias": lambda place: {"bias": place(half_hidden(1, HEADS, SEQLEN_Q, SEQLEN_K))},
    "bias of keys": lambda place: {"bias": place(half_hidden(BATCH, 1, 1, SEQLEN_K))},
    "bias of rows": lambda place: {"bias": place(torch.randn(BATCH, HEADS, SEQLEN_Q, 1).double()), "causal": True},
    "alibi": lambda place: {"alibi_slopes": place(torch.rand(BATCH, HEADS).double())},
    "softcap": lambda place: {"softcap": 1.5},
    "sinks": lambda place: {"sinks": place(torch.randn(HEADS).double()), "causal": True},
    "dropout": lambda place: {"dropout_p": 0.3},
    "score_mod": bent,
    "mask_mod": sieved,
    "documents": lambda place: {"mask_mod": mods.document(place(ids(SEQLEN_Q)), place(ids(SEQLEN_K)))},
    "prefix": lambda place: {"mask_mod": mods.prefix_lm(place(torch.tensor([5, 19])))},
    "dilated": lambda place: {"mask_mod": mods.dilated_window(4, 3, device=place(torch.zeros(1)).device)},
    "block_mask": lambda place: make_block_mask(place, SIZES, torch.float64),
    "block_mask causal": lambda place: {**make_block_mask(place, SIZES, torch.float64), "causal": True},
    "everything": lambda place: {
        **bent(place), **sieved(place), "dropout_p": 0.3, "softcap": 2.0, "window": (12, 9),
        "bias": place(half_hidden(1, HEADS, SEQLEN_Q, SEQLEN_K)), "alibi_slopes": place(torch.rand(HEADS).double()),
    },
}  # fmt: skip
PACKED: dict[str, Options] = {
    "packed": {},
    "packed causal": {"causal": True},
    "packed window": {"window": (6, 4)},
    "packed, one bad": {"bad": True, "causal": True},
}


def cuts(length: int, count: int) -> list[Piece]:
    """`count` pieces of a length, which may be empty, cut at random."""
    at = [0, *sorted(random.choices(range(length + 1), k=count - 1)), length]
    return [(first, last - first) for first, last in zip(at, at[1:], strict=False)]


def alike(got: Outputs, want: Outputs) -> None:
    """Compare by name; NaN is alike where both have it."""
    for name, x, y in zip(Outputs._fields, got, want, strict=True):
        if y is None:
            continue
        assert x is not None and x.dtype == y.dtype and x.shape == y.shape, name
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf()), name
        finite = y.isfinite()
        size = float(y[finite].abs().max()) if finite.any() else 0.0
        error = (x[finite] - y[finite]).abs().max() if finite.any() else 0.0
        assert error <= 1e-12 * (1 + size), f"{name}: {error}"


def compare(x: Inputs, backend: str, pieces: Pieces, with_dlse: bool = False) -> None:
    """Whole and parts of a call."""
    whole = whole_of(x, backend)
    do, dlse = x.do, x.dlse if with_dlse else None
    assert do is not None
    if "cu_seqlens_q" in x.options:
        do, dlse = do.transpose(0, 1)[None], None if dlse is None else dlse[None]
    o, lse = dispatch.forward(whole)
    want = Outputs(o, lse, *gradients(whole, do, dlse, o, lse)[:5])
    alike(together(whole, x, pieces, do, dlse), want)


def dense(place: Place, heads_k: int = HEADS_K, **options: Any) -> Inputs:
    sizes = {"batch": BATCH, "heads": HEADS * heads_k, "heads_k": heads_k, "seqlen_q": SEQLEN_Q, "seqlen_k": SEQLEN_K}
    return random_inputs(place, **sizes, head_dim=8, head_dim_v=12, dtype=torch.float64, **options)


@pytest.mark.sampled(10, all=True)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_parts_come_together_to_the_whole(place: Place, name: str, backend: str) -> None:
    x = dense(place, **CASES[name](place))
    compare(x, backend, Pieces(cuts(SEQLEN_Q, 2), cuts(SEQLEN_K, 3)))


@pytest.mark.sampled(4, all=True)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("draw", range(4))
def test_wherever_they_are_cut(place: Place, name: str, draw: int) -> None:
    random.seed(draw)
    x = dense(place, **CASES[name](place))
    compare(x, "torch", Pieces(cuts(SEQLEN_Q, 3), [*cuts(SEQLEN_K, 4), (SEQLEN_K, 0)]), with_dlse=True)


@pytest.mark.sampled(6, all=True)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dropout", "score_mod", "mask_mod", "blocks of each head"])
def test_some_heads_are_a_part_too(place: Place, name: str, backend: str) -> None:
    x = dense(place, 2, **CASES[name](place) if name in CASES else blocks_of_each(place))
    compare(x, backend, Pieces([(0, 9), (9, 12)], [(0, SEQLEN_K)], [(0, 1), (1, 1)]))


def blocks_of_each(place: Place) -> dict[str, Any]:
    """A block mask that heads and batch elements do not share."""

    def rule(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j // 16 <= i // 16) & ((i + h + 3 * b + j) % 4 != 0)

    device = str(place(torch.zeros(1)).device)
    return {"block_mask": create_block_mask(rule, BATCH, 4, SEQLEN_Q, SEQLEN_K, device=device, BLOCK_SIZE=16)}


@pytest.mark.sampled(6, all=True)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["positions of each", "dropout", "score_mod", "documents", "padding", "everything"])
def test_some_of_the_batch_is_a_part_too(place: Place, name: str, backend: str) -> None:
    x = dense(place, **CASES[name](place))
    compare(x, backend, Pieces([(0, 9), (9, 12)], [(0, 11), (11, 16)], batch=[(0, 1), (1, 1)]))


def packed(place: Place, bad: bool = False, **options: Any) -> Inputs:
    """Packed sequences, some of which are empty; the third one's end may be hostile, which spoils the fourth too."""
    cu_q, cu_k = [0, 5, 5, 13, 17, TOTAL_Q], [0, 8, 11, 19, 19, TOTAL_K]
    if bad:
        cu_k[3] = 6
    sizes = {"heads": HEADS, "heads_k": HEADS_K, "seqlen_q": TOTAL_Q, "seqlen_k": TOTAL_K}
    x = random_inputs(place, **sizes, head_dim=8, dtype=torch.float64)
    assert x.do is not None and x.dlse is not None
    q, k, v, do = (t[0].transpose(0, 1) for t in (x.q, x.k, x.v, x.do))
    options |= {f"cu_seqlens_{side}": place(torch.tensor(cu).int()) for side, cu in (("q", cu_q), ("k", cu_k))}
    return Inputs(q, k, v, do, x.dlse[0], options | {"max_seqlen_q": TOTAL_Q, "max_seqlen_k": TOTAL_K})


@pytest.mark.sampled(6, all=True)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*PACKED, "dropout", "score_mod", "mask_mod", "alibi", "sinks"])
def test_packed_sequences_straddle_the_cuts(place: Place, name: str, backend: str) -> None:
    options = PACKED[name] if name in PACKED else CASES[name](place)
    if name == "alibi":
        options = {"alibi_slopes": place(torch.rand(5, HEADS).double())}
    compare(packed(place, **options), backend, Pieces([(0, 9), (9, 13)], [(0, 10), (10, 6), (16, 14)]))


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("name", [*PACKED, "everything"])
@pytest.mark.parametrize("draw", range(3))
def test_packed_sequences_are_cut_anywhere(place: Place, name: str, draw: int) -> None:
    random.seed(draw)
    options = PACKED[name] if name in PACKED else CASES[name](place)
    options.pop("bias", None)
    compare(packed(place, **options), "torch", Pieces(cuts(TOTAL_Q, 3), cuts(TOTAL_K, 4)), with_dlse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_not_finite_spoils_the_rows_that_see_it_alone(place: Place, backend: str) -> None:
    x = dense(place, window=(4, 0))
    x.v[1, 0, 8] = float("nan")
    compare(x, backend, Pieces([(0, SEQLEN_Q)], [(0, 12), (12, 15)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_half_precision_part_is_rounded_once(place: Place, backend: str) -> None:
    x = random_inputs(place, heads=2, heads_k=1, seqlen_q=SEQLEN_Q, seqlen_k=50, dtype=torch.bfloat16, causal=True)
    assert x.do is not None
    x = x._replace(dlse=None)
    whole = whole_of(x, backend)
    band = band_of(whole, x, (0, SEQLEN_Q), (0, 1))
    parts = [columns(band, whole.k[:, :, at], whole.v[:, :, at], at.start) for at in (slice(0, 23), slice(23, 50))]
    outputs = [dispatch.forward(part) for part in parts]
    o, lse = merge(*outputs[0], *outputs[1])
    found = [gradients(part, x.do, None, o, lse) for part in parts]
    dq, dk, dv = found[0].q + found[1].q, *(torch.cat(pair, 2) for pair in zip(*(g[1:3] for g in found), strict=True))
    assert {t.dtype for t in (o, lse, dq, dk, dv)} == {torch.float32}
    check(Outputs(o.bfloat16(), lse, *(t.bfloat16() for t in (dq, dk, dv))), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 9])
def test_a_part_without_visible_keys_gives_nothing(place: Place, n: int, backend: str) -> None:
    x = dense(place, causal=True, q_offset=-30, bias=place(torch.randn(1, 1, 1, SEQLEN_K).double()))
    whole = whole_of(x, backend)
    o, lse = dispatch.forward(whole)
    keys = slice(12, 12 + n)
    part = columns(band_of(whole, x, (0, SEQLEN_Q), (0, HEADS_K)), x.k[:, :, keys], x.v[:, :, keys], 12)
    o_part, lse_part = dispatch.forward(part)
    assert torch.equal(o_part, torch.zeros_like(o)) and torch.equal(lse_part, torch.full_like(lse, float("-inf")))
    for gradient, operand in zip(
        gradients(part, x.do, None, o, lse), (part.q, part.k, part.v, part.mods.bias), strict=False
    ):
        assert gradient is not None and torch.equal(gradient, torch.zeros_like(operand))


@pytest.mark.parametrize("rule", ["documents", "prefix", "dilated"])
def test_spans_are_those_of_the_whole_cut(rule: str) -> None:
    x = dense(lambda t: t, **CASES[rule](lambda t: t))
    whole = whole_of(x, "torch")
    row, rows, col, n = 6, 9, 10, 7
    part = columns(
        band_of(whole, x, (row, rows), (0, HEADS_K)), x.k[:, :, col : col + n], x.v[:, :, col : col + n], col
    )
    found, spans = part.mods.spans, whole.mods.spans
    assert found is not None and spans is not None
    for axis, begin, end, (first, count), (start, length) in (
        (0, spans.key_begin, spans.key_end, (row, rows), (col, n)),
        (2, spans.query_begin, spans.query_end, (col, n), (row, rows)),
    ):
        for at in range(count):
            low = (begin[..., first + at] - start).clamp(0, length)
            high = (end[..., first + at] - start).clamp(0, length)
            assert torch.equal(found[axis][..., at], torch.where(low < high, low, length))
            assert torch.equal(found[axis + 1][..., at], torch.where(low < high, high, 0))
    assert all(x.dtype == torch.int32 for x in found)


def test_spans_that_are_wide_stay_within_32_bits() -> None:
    far = 2**31 - 1

    def spans(seqlen_q: int, seqlen_k: int, args: Any) -> Spans:
        lows, highs = (torch.full((1, 1, 1), x, dtype=torch.int32) for x in (-far, far))
        return Spans(lows, highs, lows, highs)

    rule = MaskMod(sieve, sieve_twin, (torch.tensor([2], dtype=torch.int32),), spans)
    mod = mod_of_part(rule, Extents(Extent(0, 1, 1), Extent(0, 1, 1), Extent(5, 9, SEQLEN_Q)))
    q, k = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, SEQLEN_K, 8)
    part = columns(Problem.of(q, k, k, mask_mod=mod), k[:, :, :7], k[:, :, :7], 3)
    assert [int(x) for x in part.mods.spans] == [0, 7, 0, 9]  # type: ignore[union-attr]


def test_a_mod_of_a_part_is_asked_about_the_whole() -> None:
    table = mods.document(torch.zeros(3, 30, dtype=torch.int32))
    q, k = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 30, 8)

    def of(batch: int, rows: int) -> Extents:
        return Extents(Extent(1, 1, batch), Extent(0, 1, 1), Extent(21, 9, rows))

    assert mod_of_part(None, of(3, 40)) is None
    own = mod_of_part(table, of(3, 30))
    assert isinstance(own, MaskMod) and own.handle == table.handle and own.args == table.args
    spans = Problem.of(q, k, k, mask_mod=own).mods.spans
    assert spans is not None and [x.shape for x in spans] == [(1, 1, 9), (1, 1, 9), (1, 1, 30), (1, 1, 30)]
    for wrong, words in ((of(3, 31), "all 31 of seqlen_q, got 30"), (of(4, 30), "all 4 of batch, got 3")):
        with pytest.raises(ValueError, match=words):
            Problem.of(q, k, k, mask_mod=mod_of_part(table, wrong))


def test_a_window_at_the_end_of_32_bits_is_cut_where_it_was() -> None:
    q, k = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 30, 8)
    band = Problem.of(q, k, k, window=(None, 2**40), q_offset=-(2**40))
    part = columns(band, k[:, :, 10:], k[:, :, 10:], 10)
    first, last = band.positions, part.positions
    assert first.q_offset + first.right == last.q_offset + last.right + 10 == 0


def test_an_origin_is_there_where_something_reads_it() -> None:
    q = torch.zeros(2, 2, 9, 8)
    plain, drops = Problem.of(q, q, q), Problem.of(q, q, q, dropout_p=0.5)
    assert columns(starting(plain, 2, 1, 3), q, q, 0).mods.origin is None
    assert columns(starting(drops), q, q, 0).mods.origin is None
    moved = columns(starting(drops, 2, 1, 3), q[:, :, 4:], q[:, :, 4:], 4).mods.origin
    assert moved.dtype == torch.int32 and moved.tolist() == [[2, 1, 3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_batch_element_may_begin_elsewhere(place: Place, backend: str) -> None:
    x = dense(place, **CASES["everything"](place))
    whole = whole_of(x, backend)
    origin = place(torch.tensor([[3, 0, 2, 1], [0, 1, 0, 7]], dtype=torch.int32))
    o, lse = dispatch.forward(replace(whole, mods=whole.mods._replace(origin=origin)))
    for b, own in enumerate(origin):
        alone = dispatch.forward(replace(whole, mods=whole.mods._replace(origin=own[None])))
        assert torch.equal(o[b], alone[0][b]) and torch.equal(lse[b], alone[1][b])
        assert not torch.equal(o[1 - b], alone[0][1 - b])


def test_what_is_not_cut_by_keys_is_refused() -> None:
    x = packed(lambda t: t)
    sizes = TOTAL_Q, TOTAL_K
    block_mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, *sizes, device="cpu", BLOCK_SIZE=16)
    band = Problem.of(x.q, x.k, x.v, **x.options, block_mask=block_mask)
    with pytest.raises(NotImplementedError, match="pass its rule as mask_mod"):
        columns(band, band.k, band.v, 0)
    for name, operand in (("mask", torch.ones(TOTAL_Q, TOTAL_K).bool()), ("bias", torch.zeros(1, TOTAL_K).double())):
        options = x.options | {name: operand.expand(TOTAL_Q, TOTAL_K)}
        band = Problem.of(x.q, x.k, x.v, **options)
        with pytest.raises(NotImplementedError, match=f"{name} of packed sequences"):
            columns(band, band.k, band.v, 0)


def test_the_ops_fakes_know_a_part() -> None:
    q, k = torch.randn(2, 4, 7, 16).half().transpose(1, 2), torch.randn(2, 7, 5, 16).half()
    part = columns(Problem.of(q, k, k, bias=torch.zeros(1, 1, 4, 5)), k, k, 0)
    needs = [True, True, False, True, False, False]

    def run(q: torch.Tensor, k: torch.Tensor, operands: Any) -> list[torch.Tensor]:
        _, *call = ops.call_of(part)
        o, lse = torch.ops.flash.forward(q, k, k, operands, *call)
        return [o, lse, *torch.ops.flash.backward(o, None, q, k, k, o, lse, operands, *call, needs)]

    real = run(q, k, ops.call_of(part)[0])
    with FakeTensorMode() as mode:
        fakes = [None if x is None else mode.from_tensor(x) for x in (q, k, *ops.call_of(part)[0])]
        found = run(fakes[0], fakes[1], fakes[2:])  # type: ignore[arg-type]
    assert [x.dtype for x in real] == [torch.float32] * 5
    for fake, x in zip(found, real, strict=True):
        assert (fake.dtype, fake.shape, fake.stride()) == (x.dtype, x.shape, x.stride())


def test_the_hopper_kernels_leave_parts_to_others() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from flash.kernels import hopper_backward, hopper_forward

    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
    operands = Mods(origin=torch.zeros(1, 4, dtype=torch.int32))
    assert hopper_forward.unserved(q, q, q, operands, Spec()) is None
    needs = Gradients(True, True, True)
    for reason in (
        hopper_forward.unserved(q, q, q, operands, Spec(part=True)),
        hopper_backward.unserved(q, q, q, operands, Spec(part=True), needs, False),
    ):
        assert reason == "a part of the keys, which the Hopper kernels lack"


@pytest.mark.aot
@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_a_part_compiles_for_hopper(kernel: str) -> None:
    from flash.autotune import resources
    from flash.autotune.space import Variant

    features, tiles = ("dropout", "score_mod", "mask_mod", "packed"), Config(64, 64, 4, 2)
    whole, part = (
        Variant("bfloat16", 64, 64, raw=False, features=names) for names in (features, (*features, "origin"))
    )
    assert resources.report("cuda:90", kernel, part, tiles).faults == ()
    loads = [resources.build("cuda:90", kernel, x, tiles).asm["ttir"].count("tt.load") for x in (whole, part)]
    assert loads[0] < loads[1]
