"""The torch backend's features, alone and in pairs, against the oracle, and what they cost in memory."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from flash import fallback, scoring, tiling
from flash.attention import flash_attention
from flash.mods import MaskMod, ScoreMod, document
from flash.problem import Problem
from tests.bounds import Inputs, Outputs, check
from tests.philox import dropout_mask
from tests.test_fallback import ALL, SEED, choose, inputs, run

BATCH, HEADS, BLOCK = 2, 4, 16
WAYS = ["fused", "small fused", "blocks", "small blocks"]
LENGTHS = [(37, 37), (21, 45), (45, 21)]


def bent(s: Any, b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    (weights,) = args
    return torch.sin(s) + weights[h].to(s.dtype) * (i - j + b)


def sieve(b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    return (7 * i + 3 * j + h + b + args[0]) % 4 != 0


def stairs(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Whole blocks, partial ones and empty ones, and others in every head."""
    return ((i // BLOCK + j // BLOCK + h) % 3 != 0) & ((i + j) % 5 != 0) | (i // BLOCK == 1)


def bias_of(seqlen_q: int, seqlen_k: int) -> Tensor:
    """Every head its own, with elements that hide: -inf, and the lowest number."""
    bias = torch.randn(1, HEADS, seqlen_q, seqlen_k)
    bias[torch.rand(bias.shape) < 0.1] = float("-inf")
    bias[..., 3] = torch.finfo(bias.dtype).min
    return bias


FEATURES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "causal": lambda m, n: {"causal": True},
    "window": lambda m, n: {"window": (5, 3)},
    "left": lambda m, n: {"window": (4, None)},
    "mask": lambda m, n: {"mask": torch.rand(BATCH, 1, m, n) < 0.6},
    "mask of heads": lambda m, n: {"mask": torch.rand(1, HEADS, m, 1) < 0.8},
    "padding": lambda m, n: {"mask": (torch.arange(n) < torch.tensor([[n - 7], [n // 2]]))[:, None, None]},
    "bias": lambda m, n: {"bias": bias_of(m, n)},
    "bias of keys": lambda m, n: {"bias": torch.randn(BATCH, 1, 1, n)},
    "bias of queries": lambda m, n: {"bias": torch.randn(1, 1, m, 1)},
    "alibi": lambda m, n: {"alibi_slopes": torch.rand(HEADS)},
    "alibi of batch": lambda m, n: {"alibi_slopes": torch.rand(BATCH, HEADS)},
    "softcap": lambda m, n: {"softcap": 2.0},
    "sinks": lambda m, n: {"sinks": torch.randn(HEADS)},
    "dropout": lambda m, n: {"dropout_p": 0.3},
    "score_mod": lambda m, n: {"score_mod": ScoreMod(None, bent, None, (torch.linspace(-0.1, 0.1, HEADS),))},
    "mask_mod": lambda m, n: {"mask_mod": MaskMod(None, sieve, (torch.tensor(2),))},
    "block_mask": lambda m, n: {"block_mask": create_block_mask(stairs, None, HEADS, m, n, "cpu", BLOCK)},
}


def known(x: Inputs) -> Inputs:
    """The same call for the oracle, dropout as the mask that SEED makes."""
    options = dict(x.options)
    if p := options.pop("dropout_p", 0.0):
        sizes = x.q.shape[0], x.q.shape[1], x.q.shape[2], x.k.shape[2]
        if "cu_seqlens_q" in options:
            sizes = options["cu_seqlens_q"].numel() - 1, x.q.shape[1], options["max_seqlen_q"], options["max_seqlen_k"]
        options["dropout_mask"] = dropout_mask(SEED, p, *sizes)
    return x._replace(options=options)


def call(names: tuple[str, ...], lengths: tuple[int, int], dtype: torch.dtype, with_dlse: bool = True) -> Inputs:
    """Random inputs with these features; operands in float64 where q is."""
    options: dict[str, Any] = {}
    for name in names:
        for key, value in FEATURES[name](*lengths).items():
            if isinstance(value, Tensor) and value.is_floating_point() and dtype == torch.float64:
                lowest = value == torch.finfo(value.dtype).min
                value = value.double().masked_fill(lowest, torch.finfo(dtype).min)
            options[key] = options[key] & value if key == "mask" and key in options else value
    return inputs(*lengths, dtype, (8, 8), heads=(HEADS, 2), with_dlse=with_dlse, **options)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("way", WAYS)
def test_a_feature_within_bounds(monkeypatch: pytest.MonkeyPatch, way: str, name: str) -> None:
    choose(way, monkeypatch)
    for dtype, with_dlse in itertools.product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
        for lengths in LENGTHS if dtype == torch.float64 else LENGTHS[:1]:
            x = call((name,), lengths, dtype, with_dlse)
            check(run(x), known(x))


@pytest.mark.sampled(4, all=True)
@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
@pytest.mark.parametrize("way", WAYS[1:3])
def test_a_pair_of_features_in_float64(monkeypatch: pytest.MonkeyPatch, way: str, pair: tuple[str, str]) -> None:
    choose(way, monkeypatch)
    x = call(pair, (37, 37), torch.float64, with_dlse=way == "blocks")
    check(run(x), known(x))


def test_the_fused_way_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would hold block-wise calls to the oracle twice."""
    blockwise = {"softcap", "dropout", "score_mod"}
    for run_of in ("forward_blocks", "backward_blocks"):
        monkeypatch.setattr(fallback, run_of, lambda *args, name=run_of: 1 / 0)
    for name in FEATURES:
        x = call((name,), (37, 37), torch.float32, with_dlse=False)
        if name in blockwise:
            with pytest.raises(ZeroDivisionError):
                run(x)
        else:
            run(x, ALL._replace(bias=False, alibi_slopes=False))


HIDING = ["causal", "window", "mask", "mask of heads", "padding", "bias", "mask_mod", "block_mask"]


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("way", WAYS)
def test_what_no_query_sees_never_shows(monkeypatch: pytest.MonkeyPatch, way: str, name: str) -> None:
    """NaN and inf in keys and values that all rows but the last ones are kept from, by each means."""
    choose(way, monkeypatch)
    n, hidden = 40, slice(30, 40)
    j = torch.arange(n)
    means: dict[str, dict[str, Any]] = {
        "causal": {"causal": True, "q_offset": -10},
        "window": {"window": (None, 0), "q_offset": -10},
        "mask": {"mask": (torch.rand(BATCH, 1, n, n) < 0.6) & (j < 30)},
        "mask of heads": {"mask": (j < 30).expand(1, HEADS, 1, n)},
        "padding": {"mask": (j < 30)[None, None, None].expand(BATCH, 1, 1, n)},
        "bias": {"bias": torch.zeros(1, 1, 1, n).masked_fill(j >= 30, torch.finfo(torch.float32).min)},
        "mask_mod": {"mask_mod": MaskMod(None, lambda b, h, i, j, args: (j < 30) & (i != 3))},
        "block_mask": {"block_mask": create_block_mask(lambda b, h, i, j: j < 30, None, None, n, n, "cpu", BLOCK)},
    }
    for bad, others in itertools.product((float("nan"), float("inf")), ({}, {"sinks": torch.randn(HEADS)})):
        x = inputs(n, n, torch.float32, (8, 8), heads=(HEADS, 2), **means[name], **others)
        want = run(x)
        k, v = x.k.clone(), x.v.clone()
        k[:, :, hidden], v[:, :, hidden] = bad, bad
        for field, got, clean in zip(Outputs._fields, run(x._replace(k=k, v=v)), want, strict=True):
            if clean is not None:
                torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-5, msg=lambda line, f=field: f"{f}: {line}")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_in_an_operand_stays_in_its_rows(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """And in the gradients of the keys that these rows see."""
    choose(way, monkeypatch)
    n, row = 40, 5
    i, j = torch.arange(n)[:, None], torch.arange(n)
    mask = (torch.rand(1, 1, n, n) < 0.6) & ((i != row) | (j < 30))
    mask[0, 0, row, 0] = True
    others = torch.arange(n) != row
    for bad, hidden in itertools.product((float("nan"), float("inf")), (False, True)):
        bias = torch.randn(1, 1, n, n)
        x = inputs(n, n, torch.float32, (8, 8), heads=(HEADS, 2), mask=mask, bias=bias)
        want = run(x, ALL._replace(bias="blocks" in way))
        dirty = bias.clone()
        dirty[0, 0, row, 35 if hidden else 0] = bad
        got = run(x._replace(options={"mask": mask, "bias": dirty}), ALL._replace(bias="blocks" in way))
        rows = slice(None) if hidden else others
        for a, b in (got.o, want.o), (got.lse, want.lse), (got.dq, want.dq):
            torch.testing.assert_close(a[:, :, rows], b[:, :, rows], rtol=1e-5, atol=1e-5)
        for a, b in (got.dk, want.dk), (got.dv, want.dv):
            torch.testing.assert_close(a[:, :, 30:], b[:, :, 30:], rtol=1e-5, atol=1e-5)
        assert hidden or got.o[:, :, row].isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_huge_biases(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """No rounding of a score may come out as another weight, and those far below a row's best are 0."""
    choose(way, monkeypatch)
    bias = torch.where(torch.rand(1, 1, 33, 37) < 0.5, -1e9, 0.0)
    for operand in (bias, bias + 1e9, bias - 1e9, 1e7 * torch.randn(1, HEADS, 33, 37)):
        x = inputs(33, 37, torch.float32, (8, 8), heads=(HEADS, 2), bias=operand)
        check(run(x, ALL._replace(bias="blocks" in way)), x, saturated=True)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_see_nothing(monkeypatch: pytest.MonkeyPatch, way: str, with_sinks: bool) -> None:
    """o = 0 and gradients 0 by every means; lse = -inf, or the sink."""
    choose(way, monkeypatch)
    n, row = 24, 20
    i = torch.arange(n)[:, None]
    seen = (i != row).expand(n, n)[None, None]
    lowest = torch.finfo(torch.float32).min
    means: list[dict[str, Any]] = [
        {"mask": seen},
        {"mask": seen[..., :1]},
        {"bias": torch.zeros(1, 1, n, n).masked_fill(~seen, float("-inf"))},
        {"bias": torch.zeros(1, 1, n, 1).masked_fill(~seen[..., :1], lowest)},
        {"mask_mod": MaskMod(None, lambda b, h, i, j, args: i != row)},
        {"block_mask": create_block_mask(lambda b, h, i, j: i != row, None, None, n, n, "cpu", BLOCK)},
        {"window": (0, 0), "q_offset": n - row},
        {"causal": True, "q_offset": -row - 1},
        {"mask": torch.zeros(1, 1, 1, n, dtype=torch.bool)},
    ]
    sinks = torch.randn(HEADS)
    for options in means:
        for extra in ({}, {"score_mod": ScoreMod(None, lambda s, b, h, i, j, args: s / (i - row), None)}):
            extra = {**extra, "sinks": sinks} if with_sinks else extra
            x = inputs(n, n, torch.float32, (8, 8), heads=(HEADS, 2), with_dlse="blocks" in way, **options, **extra)
            got = run(x)
            assert (got.o[:, :, row] == 0).all() and (got.dq[:, :, row] == 0).all()
            want = sinks.expand(2, HEADS) if with_sinks else torch.full((2, HEADS), float("-inf"))
            assert torch.equal(got.lse[:, :, row], want)
            assert all(t.isfinite().all() for t in got[2:] if t is not None)


PACKED = ((5, 7), (0, 4), (17, 17), (9, 0), (0, 0), (30, 25))


def packed(names: tuple[str, ...], lengths: tuple[tuple[int, int], ...] = PACKED) -> Inputs:
    """A packed call with these features, some rows and keys of no sequence at the end."""
    seqlen_q, seqlen_k = (max(pair[axis] for pair in lengths) for axis in (0, 1))
    cu = [torch.tensor([0, *(pair[axis] for pair in lengths)]).cumsum(0).to(torch.int32) for axis in (0, 1)]
    total_q, total_k = int(cu[0][-1]) + 4, int(cu[1][-1]) + 3
    options: dict[str, Any] = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}
    options |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k}
    for name in names:
        if name == "block_mask":
            options |= {name: create_block_mask(stairs, None, HEADS, total_q, total_k, "cpu", BLOCK)}
            continue
        for key, value in FEATURES[name](seqlen_q, seqlen_k).items():
            if isinstance(value, Tensor):
                if value.shape[0] == BATCH:
                    more = [FEATURES[name](seqlen_q, seqlen_k)[key] for _ in lengths]
                    value = torch.cat(more)[: len(lengths)]
                value = value.double().masked_fill(value < -1e30, float("-inf")) if key != "mask" else value
            options[key] = value
    q, do = (torch.randn(total_q, HEADS, 8).double() for _ in range(2))
    k, v = (torch.randn(total_k, 2, 8).double() for _ in range(2))
    return Inputs(q, k, v, do, torch.randn(HEADS, total_q).double(), options)


@pytest.mark.parametrize("name", [None, *FEATURES])
@pytest.mark.parametrize("way", WAYS)
def test_packed_sequences(monkeypatch: pytest.MonkeyPatch, way: str, name: str | None) -> None:
    choose(way, monkeypatch)
    x = packed(() if name is None else (name,))
    x = x._replace(dlse=x.dlse if "blocks" in way else None)
    check(run(x), known(x))


def test_a_hostile_sequence_is_nan_and_the_others_keep_their_bits() -> None:
    x = packed(("causal", "bias"))
    want = run(x)
    cu = x.options["cu_seqlens_q"].clone()
    cu[3] = 3  # the third sequence ends before it starts, and the fourth starts within the first
    got = run(x._replace(options={**x.options, "cu_seqlens_q": cu}))
    rows = torch.ones(len(x.q), dtype=torch.bool)
    starts = torch.clamp(cu.cummax(0).values, 0, len(x.q))
    bad = ((starts[1:] != cu[1:]) | (starts[:-1] != cu[:-1])).tolist()
    assert sum(bad) == 2
    for b, hostile in enumerate(bad):
        if hostile:
            rows[starts[b] : starts[b + 1]] = False
    assert got.o[~rows].isnan().all() and got.dq[~rows].isnan().all() and got.lse[:, ~rows].isnan().all()
    first = slice(0, 5)  # the first sequence
    assert torch.equal(got.o[first], want.o[first]) and torch.equal(got.dq[first], want.dq[first])
    assert torch.equal(got.lse[:, first], want.lse[:, first]) and torch.equal(got.dk[:7], want.dk[:7])
    assert got.dbias.isfinite().all()


def test_the_derivative_of_a_score_function_inside_the_op() -> None:
    """Autograd is off in there; gradcheck through the public call."""
    q, k, v = (torch.randn(1, HEADS, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weights = torch.linspace(-0.1, 0.1, HEADS)
    for torch_fn in (bent, lambda s, b, h, i, j, args: s * s, lambda s, b, h, i, j, args: args[0][h] * (i - j)):
        mod = ScoreMod(None, torch_fn, None, (weights,))
        torch.autograd.gradcheck(lambda *x, mod=mod: flash_attention(*x, score_mod=mod, backend="torch"), (q, k, v))


def test_a_score_function_may_return_its_argument() -> None:
    table = torch.randn(HEADS, 37, 37)
    before = table.clone()
    mod = ScoreMod(None, lambda s, *_: table.to(s.dtype).expand(s.shape), None)
    x = inputs(37, 37, torch.float32, (8, 8), heads=(HEADS, 2), score_mod=mod)
    check(run(x), x)
    assert torch.equal(table, before)


def test_hidden_tiles_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visited pairs are those of the tiles that hold a visible one, for every means that says so beforehand."""
    n = 256
    q = torch.randn(1, 1, n, 4)
    monkeypatch.setattr(tiling, "NARROW_ROWS", BLOCK)
    ids = torch.arange(n) // 48
    blocks = create_block_mask(lambda b, h, i, j: (i // 32 == j // 32) | (j < 16), None, None, n, n, "cpu", BLOCK)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    means: list[tuple[dict[str, Any], Tensor]] = [
        ({"window": (20, 9)}, (j - i >= -20) & (j - i <= 9)),
        ({"window": (20, None), "causal": True}, (j - i >= -20) & (j <= i)),
        ({"mask": (j < 100)[None, None, None]}, (j < 100).expand(n, n)),
        ({"mask_mod": document(ids)}, ids[:, None] == ids),
        ({"block_mask": blocks}, (i // 32 == j // 32) | (j < 16)),
    ]
    for options, visible in means:
        p = Problem.of(q, q, q, **options)
        at = tiling.Call(p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions)
        area = 0
        for tile in tiling.tiles(at, tiling.pairs_of_a_tile(at)):
            seen = visible[tile.rows][:, tile.cols]
            assert int(seen.sum()) == int(visible[tile.rows].sum())
            area += seen.numel()
        rows = visible.view(n // BLOCK, BLOCK, n).any(1)  # what a tile of BLOCK rows cannot do without
        assert area == BLOCK * int(rows.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, -300, 2**23 - 50, 2**24 + 1, 2**29 + 3, -(2**30) + 600])
def test_distances_are_rounded_once_whatever_the_tile(dtype: torch.dtype, offset: int) -> None:
    p = Problem.of(*[torch.zeros(1, 1, 40, 8, dtype=dtype)] * 3, q_offset=offset)
    call = tiling.Call(p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions)
    (whole,) = tiling.tiles(call, 40 * 40)
    exact = (whole.positions(p.q.device) - whole.keys(p.q.device)).abs()
    assert int(exact.amax()) > abs(offset) - 40
    for tile in (whole, *tiling.tiles(call, 7 * 40)):
        assert torch.equal(scoring.distances(call, tile, dtype), exact[tile.rows].to(dtype))


@pytest.mark.parametrize("options", [{"softcap": 1e6}, {"dropout_p": 1e-9}, {"alibi_slopes": torch.zeros(1)}], ids=str)
def test_the_scale_comes_after_the_product(options: dict[str, Any]) -> None:
    q, k, v = (torch.tensor(x)[None, None, :, None] for x in ([1e30, 1e30], [2e-38, 3e-38], [1.0, 2.0]))
    o = flash_attention(q, k, v, scale=1e9, backend="torch", **options)
    weights = ((q.double() @ k.double().mT) * 1e9).softmax(-1)
    torch.testing.assert_close(o, (weights @ v.double()).float())


PEAK = """
import sys, torch
sys.path.insert(0, "")
from flash import fallback, fused
from flash.kernels.spec import Gradients
from flash.mods import MaskMod, ScoreMod
from flash.problem import Problem
from torch.nn.attention.flex_attention import create_block_mask
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
blocks = create_block_mask(lambda b, h, i, j: (i - j) % 1024 < 512, None, None, 4096, 4096, "cpu", 128)
features = {
    "nothing": lambda n: {},
    "window": lambda n: {"window": 100, "causal": True},
    "padding": lambda n: {"mask": (torch.arange(n) % 7 != 0)[None, None, None]},
    "bias": lambda n: {"bias": torch.randn(1, 4, 1, n)},
    "alibi": lambda n: {"alibi_slopes": torch.rand(4)},
    "softcap": lambda n: {"softcap": 3.0},
    "sinks": lambda n: {"sinks": torch.rand(4)},
    "dropout": lambda n: {"dropout_p": 0.1},
    "score_mod": lambda n: {"score_mod": ScoreMod(None, lambda s, b, h, i, j, args: s + 0.01 * (i - j), None)},
    "mask_mod": lambda n: {"mask_mod": MaskMod(None, lambda b, h, i, j, args: (i + j + h) % 3 != 0)},
    "block_mask": lambda n: {"block_mask": blocks} if n == 4096 else {},
}
def call(name, n):
    q, k, v, do = torch.randn(4, 1, 4, n, 16).unbind()
    p = Problem.of(q, k, v, **features[name](n))
    mods = p.mods._replace(seed=torch.tensor([7]))
    needs = Gradients(True, True, True, *(x is not None for x in (mods.bias, mods.alibi_slopes, mods.sinks)))
    rest = mods, p.spec, p.scale, p.positions
    o, lse = fallback.forward(q, k, v, *rest)
    fallback.backward(do, None, q, k, v, o, lse, *rest, needs)
way, *names = sys.argv[1:]
if way == "blocks":
    fused.serves = lambda *operands: False
for name in names:
    call(name, 64)
before = peak()
for name in names:
    call(name, 4096)
    print(name, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize(
    ("way", "names"),
    [
        ("fused", ["nothing", "window", "padding", "sinks", "mask_mod", "block_mask"]),
        pytest.param("blocks", ["nothing", "bias", "alibi", "softcap", "dropout", "score_mod"], marks=pytest.mark.slow),
    ],
)
def test_memory_grows_with_length_not_its_square(way: str, names: list[str]) -> None:
    """At length 4096 the scores would be 256 MiB, and a mask of all pairs 16 MiB of bytes or 64 of floats."""
    done = subprocess.run([sys.executable, "-c", PEAK, way, *names], capture_output=True, text=True, check=True)
    held = 4 * 4096 * (16 * 8 + 1) * 4 // 1024  # KiB of q, k, v, do, o, dq, dk, dv and lse
    for line in done.stdout.splitlines():
        assert int(line.split()[1]) < held + 40 * 1024, line
    assert len(done.stdout.splitlines()) == len(names)


def test_a_mask_that_hides_nothing_of_a_head_leaves_it_alone() -> None:
    # the head before it in the group has rows without keys
    q, k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    mask = torch.ones(1, 2, 40, 40, dtype=torch.bool)
    mask[:, 0, :5] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = flash_attention(*leaves, mask=mask, return_lse=True)
    alone, lse_alone = flash_attention(q[:, 1:], k, v, return_lse=True)
    torch.testing.assert_close(lse[:, 1:], lse_alone)
    torch.testing.assert_close(o[:, 1:], alone)
    got = torch.autograd.grad(o[:, 1:].square().sum(), leaves)
    want = torch.autograd.grad(alone.square().sum(), leaves)
    torch.testing.assert_close(got, want)
