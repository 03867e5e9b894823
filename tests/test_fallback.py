"""The torch backend against the oracle, output by output, and its two ways against one another."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flash import fallback, fused, tiling
from flash.kernels.spec import Gradients, Mods, Positions, Spec, dense_like
from flash.problem import Problem
from tests.bounds import Inputs, Outputs, check, oracle

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
ALL = Gradients(True, True, True, True, True, True)
SEED = 0x123456789ABCDEF


def inputs(
    seqlen_q: int, seqlen_k: int, dtype: torch.dtype, dims: tuple[int, int] = (40, 40), **options: Any
) -> Inputs:
    heads, heads_k = options.pop("heads", (4, 2))
    shapes = (heads, seqlen_q, dims[0]), (heads_k, seqlen_k, dims[0]), (heads_k, seqlen_k, dims[1])
    q, k, v = (torch.randn(2, *shape).to(dtype) for shape in shapes)
    do, dlse = torch.randn(2, heads, seqlen_q, dims[1]).to(dtype), torch.randn(2, heads, seqlen_q)
    dlse = dlse if options.pop("with_dlse", False) else None
    return Inputs(q, k, v, do, dlse, options)


def run(x: Inputs, needs: Gradients = ALL) -> Outputs:
    """Forward and backward of a call, dense or packed, with these of the gradients; dropout's key is SEED."""
    p = Problem.of(x.q, x.k, x.v, **x.options)
    mods = p.mods._replace(seed=torch.tensor([SEED])) if p.spec.dropout_p else p.mods
    needs = Gradients(*(need and t is not None for need, t in zip(needs, (*x[:3], *operands_of(mods)), strict=True)))
    call = mods, p.spec, p.scale, p.positions
    do, dlse = x.do, x.dlse
    if mods.starts_q is not None:
        do, dlse = do.transpose(0, 1)[None], None if dlse is None else dlse[None]
    o, lse = fallback.forward(p.q, p.k, p.v, *call)
    grads = fallback.backward(do, dlse, p.q, p.k, p.v, o, lse, *call, needs)
    if grads.alibi_slopes is not None:
        grads = grads._replace(alibi_slopes=grads.alibi_slopes.view_as(x.options["alibi_slopes"]))
    found = o, lse, *grads
    if mods.starts_q is None:
        return Outputs(*found)
    dense = [t if t is None else t[0] for t in found[:5]]
    return Outputs(*(t if t is None or t is dense[1] else t.transpose(0, 1) for t in dense), *found[5:])


def operands_of(mods: Mods) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those that have a gradient, in the order of Gradients."""
    return mods.bias, mods.alibi_slopes, mods.sinks


@pytest.fixture(params=["fused", "small fused", "blocks", "small blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, and many tiles where the test's lengths would make one."""
    choose(request.param, monkeypatch)
    return request.param


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one of the ways, large or small."""
    if "blocks" in way:
        monkeypatch.setattr(fused, "serves", lambda *operands: False)
    if "small" in way:
        monkeypatch.setattr(tiling, "TILE_BYTES", 4096)
        monkeypatch.setattr(tiling, "NARROW_BYTES", 4096)
        monkeypatch.setattr(tiling, "NARROW_ROWS", 8)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_bounds(way: str, dtype: torch.dtype, causal: bool, with_dlse: bool) -> None:
    for lengths in itertools.chain(((n, n) for n in (1, 2, 17, 63, 113)), ((17, 63), (63, 17), (1, 113), (2, 3))):
        x = inputs(*lengths, dtype, causal=causal, with_dlse=with_dlse)
        check(run(x), x)


@pytest.mark.parametrize("q_offset", [0, 1, 7, -5, 100, -100, torch.tensor([3, -4], dtype=torch.int32)], ids=str)
def test_offsets(way: str, q_offset: int | Tensor) -> None:
    for lengths in ((17, 17), (17, 40), (40, 17)):
        x = inputs(*lengths, torch.float64, causal=True, q_offset=q_offset)
        check(run(x), x)


@pytest.mark.parametrize("dims", [(1, 1), (3, 8), (64, 64), (80, 40), (96, 96), (128, 128), (257, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_head_dims(way: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    x = inputs(17, 33, dtype, dims, causal=True)
    check(run(x), x)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_shared_heads(way: str, heads: tuple[int, int]) -> None:
    x = inputs(33, 37, torch.float32, heads=heads, causal=True)
    check(run(x), x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [-0.5, -1e-3, 0.0, 5e-324, 1e-38, 1e-20, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scales(way: str, dtype: torch.dtype, scale: float, causal: bool) -> None:
    x = inputs(17, 23, dtype, (8, 8), scale=scale, causal=causal)
    check(run(x), x, saturated=scale == 3.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1e6, 1e8, -1e8, 1e10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores(way: str, dtype: torch.dtype, scale: float, causal: bool) -> None:
    """Weights are 0 or 1, and every gradient of a score is 0: no rounding of s may come out as another weight."""
    x = inputs(33, 65, dtype, (8, 8), scale=scale, causal=causal)
    eps = max(1e-6, torch.finfo(dtype).eps)
    for name, got, want in zip(Outputs._fields[:5], run(x)[:5], oracle(x)[:5], strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=eps, atol=1e-5, msg=lambda line, name=name: f"{name}: {line}"
        )


def test_weights_are_at_most_one() -> None:
    """Where lse came from scores that rounded otherwise, which is by 1024 among scores of 1e10."""
    x = inputs(33, 65, torch.float32, (8, 8), scale=1e10)
    call = Mods(), Spec(), 1e10, Positions()
    o, lse = fallback.forward(x.q, x.k, x.v, *call)
    less = lse.nextafter(torch.tensor(float("-inf")))
    want = fallback.backward(x.do, None, x.q, x.k, x.v, o, lse, *call, Gradients(True, True, True))
    got = fallback.backward(x.do, None, x.q, x.k, x.v, o, less, *call, Gradients(True, True, True))
    for grad, grad_want in zip(got[:3], want[:3], strict=True):
        assert torch.equal(grad, grad_want)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_zero_lengths(way: str, seqlen_q: int, seqlen_k: int) -> None:
    x = inputs(seqlen_q, seqlen_k, torch.float32)
    check(run(x), x)


def test_empty_batch(way: str) -> None:
    x = inputs(5, 5, torch.float32)
    empty = Inputs(*(t[:0] for t in x[:4]))
    assert [t.shape for t in run(empty)[:5]] == [t[:0].shape for t in run(x)[:5]]


def test_rows_without_keys_return_zero(way: str) -> None:
    x = inputs(7, 5, torch.float32, causal=True, q_offset=-3, with_dlse="blocks" in way)
    got = run(x)
    assert (got.o[:, :, :3] == 0).all() and (got.lse[:, :, :3] == float("-inf")).all()
    assert (got.dq[:, :, :3] == 0).all() and (got.dk[:, :, 4:] == 0).all() and (got.dv[:, :, 4:] == 0).all()
    check(got, x)


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_only_what_sees_it(monkeypatch: pytest.MonkeyPatch, name: str, bad: float) -> None:
    for tile_bytes in (tiling.TILE_BYTES, 1024):
        monkeypatch.setattr(tiling, "TILE_BYTES", tile_bytes)
        monkeypatch.setattr(tiling, "NARROW_BYTES", tile_bytes)
        x = inputs(33, 33, torch.float32, (8, 8), causal=True)
        want = run(x)
        dirty = getattr(x, name).clone()
        dirty[:, :, 20] = bad
        got = run(x._replace(**{name: dirty}))
        for rows in (want.o, got.o), (want.lse, got.lse), (want.dq, got.dq):
            seen = slice(20, 21) if name in ("q", "do") else slice(20, 33)
            unseen = torch.ones(33, dtype=torch.bool)
            unseen[seen] = False
            torch.testing.assert_close(rows[1][:, :, unseen], rows[0][:, :, unseen], rtol=1e-5, atol=1e-5)
        if name in ("q", "do"):
            for keys in (want.dk, got.dk), (want.dv, got.dv):
                torch.testing.assert_close(keys[1][:, :, 21:], keys[0][:, :, 21:], rtol=1e-5, atol=1e-5)
        if name != "do":
            affected = got.o[:, :, 20] if name == "q" else got.o[:, :, 20:]
            assert not affected.isfinite().any() or bad == float("inf")


def strided(x: Tensor) -> dict[str, Tensor]:
    """x's values under strides of every kind."""
    batch, heads, seqlen, head_dim = x.shape
    wide = torch.full((batch, heads, seqlen + 2, head_dim + 3), float("nan"), dtype=x.dtype)
    wide[:, :, 1:-1, 1 : head_dim + 1] = x
    packed = torch.stack([torch.full_like(x, float("nan")), x], 3)
    return {
        "bshd": x.transpose(1, 2).contiguous().transpose(1, 2),
        "head_dim outermost": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "padded, one element off": wide[:, :, 1:-1, 1 : head_dim + 1],
        "packed": packed[:, :, :, 1],
        "every other head": torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(way: str, dtype: torch.dtype) -> None:
    x = inputs(65, 81, dtype, causal=True)
    want = run(x)
    views = [strided(t) for t in x[:4]]
    for kind in views[0]:
        got = run(Inputs(*(view[kind] for view in views), options=x.options))
        for name, a, b in zip(Outputs._fields[:5], got[:5], want[:5], strict=True):
            assert torch.equal(a, b), f"{kind}: {name}"


def test_expanded_inputs_change_no_bit(way: str) -> None:
    x = inputs(33, 33, torch.float32)
    one = [t[:1, :1, :, :1].expand_as(t) for t in x[:4]]
    for a, b in zip(run(Inputs(*one))[:5], run(Inputs(*(t.contiguous() for t in one)))[:5], strict=True):
        assert torch.equal(a, b)


def test_output_keeps_the_order_of_axes(way: str) -> None:
    x = inputs(5, 7, torch.float32, (8, 6))
    views = [strided(t)["bshd"] for t in x[:4]]
    got = run(Inputs(*views))
    for t in (got.o, got.dq, got.dk, got.dv):
        assert t.transpose(1, 2).is_contiguous()
    assert got.lse.is_contiguous() and run(x).o.is_contiguous()


@pytest.mark.parametrize("head_dim_v", [8, 6])
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 4, 16, 8), (128, 0, 8, 1)),
        ((2, 4, 16, 8), (0, 0, 8, 1)),
        ((2, 4, 16, 8), (0, 0, 0, 0)),
        ((2, 4, 16, 8), (512, 128, 1, 0)),
        ((2, 4, 16, 8), (128, 128, 8, 1)),
        ((1, 4, 16, 8), (128, 128, 8, 1)),
        ((2, 1, 16, 8), (128, 1, 8, 1)),
        ((2, 4, 1, 8), (8, 16, 1, 1)),
        ((2, 4, 16, 8), (512, 8, 32, 1)),
        ((2, 4, 16, 8), (512, 128, 1, 16)),
        ((2, 4, 16, 8), (1, 2, 8, 128)),
    ],
    ids=str,
)
def test_strides_are_those_of_the_fakes(
    way: str, shape: tuple[int, ...], strides: tuple[int, ...], head_dim_v: int
) -> None:
    """What flash/autograd.py promises torch.compile."""
    q, v = torch.randn(1024).as_strided(shape, strides), torch.randn(1024).as_strided((*shape[:3], head_dim_v), strides)
    do = torch.randn(*shape[:3], head_dim_v)
    got = run(Inputs(q, q, v, do))
    wants = dense_like(q, head_dim_v), torch.empty(shape[:3]), *(torch.empty_like(x) for x in (q, q, v))
    for t, want in zip(got[:5], wants, strict=True):
        assert t.stride() == want.stride() and t.storage_offset() == 0


def test_only_asked_for_gradients() -> None:
    x = inputs(9, 9, torch.float32)
    want = run(x)
    for needs in itertools.product([False, True], repeat=3):
        found = run(x, Gradients(*needs, False, False, False))
        for got, grad, need in zip(found[2:5], want[2:5], needs, strict=True):
            assert torch.equal(got, grad) if need else got is None


def test_same_bits_every_time(way: str) -> None:
    x = inputs(113, 113, torch.float32, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(run(x)[:5], run(x)[:5], strict=True))


def test_hidden_tiles_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(64, 64, torch.float32)
    monkeypatch.setattr(tiling, "TILE_BYTES", 4096)
    areas = []
    for causal in (False, True):
        call = tiling.Call(x.q, x.k, x.v, Mods(), Spec(causal=causal), 1.0, Positions())
        tiles = list(tiling.tiles(call, tiling.pairs_of_a_tile(call)))
        areas.append(sum((t.rows.stop - t.rows.start) * (t.cols.stop - t.cols.start) for t in tiles))
    assert areas[0] == 2 * 2 * 64 * 64 and areas[1] < 0.6 * areas[0]
