"""Queries that see no key, and keys that no query sees, by every means there is.

Without a sink such a query has o = 0 and lse = -inf; with one, its softmax is the sink alone: o = 0 and lse = sink.
Gradients are finite, and zero where nothing is seen; a sink's own gradient is dlse of its rows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flash.mods import MaskMod, document
from tests import features
from tests.bounds import Inputs, check, oracle
from tests.calls import Place
from tests.features import Sizes

pytestmark = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])

SEQLEN_Q, SEQLEN_K = 37, 50
SIZES = Sizes(batch=2, heads=2, heads_k=1, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, head_dim=16, head_dim_v=16)
Means = Callable[[Place, torch.dtype], dict[str, Any]]


def bias_of(lowest: float, rows: slice, cols: slice) -> Means:
    def make(place: Place, dtype: torch.dtype) -> dict[str, Any]:
        bias = torch.randn(1, 2, SEQLEN_Q, SEQLEN_K).to(dtype)
        bias[:, :, rows, cols] = torch.finfo(dtype).min if lowest != float("-inf") else lowest
        return {"bias": place(bias)}

    return make


def mask_of(rows: slice, cols: slice) -> Means:
    def make(place: Place, dtype: torch.dtype) -> dict[str, Any]:
        mask = torch.ones(2, 1, SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
        mask[:, :, rows, cols] = False
        return {"mask": place(mask)}

    return make


def padding_of(kept: int) -> Means:
    def make(place: Place, dtype: torch.dtype) -> dict[str, Any]:
        lengths = torch.tensor([SEQLEN_K, kept]) if kept == 0 else torch.tensor([kept, kept])
        return {"mask": place((torch.arange(SEQLEN_K) < lengths[:, None])[:, None, None])}

    return make


def blocks_of(rule: Callable[..., Any]) -> Means:
    def make(place: Place, dtype: torch.dtype) -> dict[str, Any]:
        device = place(torch.zeros(1)).device
        return {"block_mask": create_block_mask(rule, None, None, SEQLEN_Q, SEQLEN_K, str(device), BLOCK_SIZE=16)}

    return make


def ids_of(queries: Callable[[torch.Tensor], torch.Tensor], keys: Callable[[torch.Tensor], torch.Tensor]) -> Means:
    def make(place: Place, dtype: torch.dtype) -> dict[str, Any]:
        return {"mask_mod": document(*(place(f(torch.arange(n))) for f, n in ((queries, SEQLEN_Q), (keys, SEQLEN_K))))}

    return make


def positions_of(**options: Any) -> Means:
    return lambda place, dtype: options


ALL, FIRST = slice(None), slice(0, 7)
EMPTY_ROWS: dict[str, tuple[Means, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    # the keywords, and which rows (b, i) are empty
    "mask": (mask_of(FIRST, ALL), lambda b, i: i < 7),
    "window": (positions_of(window=(2, 1), q_offset=30), lambda b, i: i + 30 - 2 >= SEQLEN_K),
    "window before the keys": (positions_of(window=(1, 2), q_offset=-20), lambda b, i: i - 20 + 2 < 0),
    "causal": (positions_of(causal=True, q_offset=-7), lambda b, i: i < 7),
    "padding": (padding_of(0), lambda b, i: b == 1),
    "bias of -inf": (bias_of(float("-inf"), FIRST, ALL), lambda b, i: i < 7),
    "bias of the lowest number": (bias_of(0.0, FIRST, ALL), lambda b, i: i < 7),
    "mask_mod": (ids_of(lambda i: i // 20, lambda j: 0 * j), lambda b, i: i >= 20),
    "block_mask": (blocks_of(lambda b, h, i, j: (i >= 16) & (j < i)), lambda b, i: i < 16),
    "causal and padding": (
        lambda place, dtype: {
            "mask": place(torch.arange(SEQLEN_K) >= 9)[None, None, None],
            "causal": True,
            "q_offset": 0,
        },
        lambda b, i: i < 9,
    ),
}
UNSEEN_KEYS: dict[str, tuple[Means, Callable[[torch.Tensor], torch.Tensor]]] = {
    "mask": (mask_of(ALL, slice(11, 30)), lambda j: (j >= 11) & (j < 30)),
    "window": (positions_of(window=(3, 1), q_offset=5), lambda j: (j < 2) | (j > SEQLEN_Q + 5)),
    "causal": (positions_of(causal=True, q_offset=0), lambda j: j >= SEQLEN_Q),
    "padding": (padding_of(31), lambda j: j >= 31),
    "padding of all": (lambda place, dtype: {"mask": place(torch.zeros(2, 1, 1, SEQLEN_K).bool())}, lambda j: j >= 0),
    "bias of -inf": (bias_of(float("-inf"), ALL, slice(17, 40)), lambda j: (j >= 17) & (j < 40)),
    "bias of the lowest number": (bias_of(0.0, ALL, slice(17, 40)), lambda j: (j >= 17) & (j < 40)),
    "mask_mod": (ids_of(lambda i: 0 * i, lambda j: j // 20), lambda j: j >= 20),
    "block_mask": (blocks_of(lambda b, h, i, j: (j >= 19) & (j < 40)), lambda j: (j < 19) | (j >= 40)),
}


def empty_rows(name: str) -> torch.Tensor:
    b, i = torch.arange(2)[:, None], torch.arange(SEQLEN_Q)[None]
    return (EMPTY_ROWS[name][1](b, i) & (i >= 0) & (b >= 0))[:, None].expand(2, 2, SEQLEN_Q)


def call(place: Place, means: Means, dtype: torch.dtype, *more: str) -> Inputs:
    x = features.call_of(place, more, SIZES, dtype)
    return x._replace(options={**x.options, **means(place, dtype)})


@pytest.mark.sampled(16)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_a_row_without_keys_is_zero(place: Place, backend: str, name: str, dtype: torch.dtype) -> None:
    x = call(place, EMPTY_ROWS[name][0], dtype)
    got, empty = features.run(x, backend), empty_rows(name).to(x.q.device)
    assert empty.any() and torch.equal(got.lse == float("-inf"), empty)
    assert (got.o[empty] == 0).all() and got.dq is not None and (got.dq[empty] == 0).all()
    assert all(t is None or t.isfinite().all() for t in got[2:])
    check(got, x)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_a_row_with_a_sink_alone_has_the_sink_as_lse(place: Place, backend: str, name: str) -> None:
    x = call(place, EMPTY_ROWS[name][0], torch.float64, "sinks")
    got, empty = features.run(x, backend), empty_rows(name).to(x.q.device)
    sinks = x.options["sinks"][None, :, None].expand(got.lse.shape)
    assert torch.allclose(got.lse[empty], sinks[empty], rtol=1e-14) and got.lse.isfinite().all()
    assert (got.o[empty] == 0).all() and got.dq is not None and (got.dq[empty] == 0).all()
    check(got, x)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_every_row_may_be_empty_and_no_gradient_is_strange(place: Place, backend: str, name: str) -> None:
    x = call(place, EMPTY_ROWS[name][0], torch.float64, "alibi_slopes", "softcap")
    nothing = place(torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    x.options["mask"] = nothing
    got = features.run(x, backend)
    assert (got.o == 0).all() and (got.lse == float("-inf")).all()
    assert all(t is None or (t == 0).all() for t in got[2:])


@pytest.mark.sampled(24)
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", UNSEEN_KEYS)
def test_what_no_query_may_see_never_shows(place: Place, backend: str, name: str, strange: float) -> None:
    means, unseen = UNSEEN_KEYS[name]
    x = call(place, means, torch.float64)
    clean = features.run(x, backend)
    keys = unseen(torch.arange(SEQLEN_K)).to(x.k.device)
    assert keys.any()
    for t in (x.k, x.v):
        t[:, :, keys] = strange
    got = features.run(x, backend)
    assert got.dk is not None and (got.dk[:, :, keys] == 0).all()
    assert got.dv is not None and (got.dv[:, :, keys] == 0).all()
    for output, a, b in zip(got._fields, got, clean, strict=True):
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), output


@pytest.mark.sampled(24)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNSEEN_KEYS)
def test_what_no_query_may_see_never_shows_in_narrow_types(
    place: Place, backend: str, name: str, dtype: torch.dtype
) -> None:
    means, unseen = UNSEEN_KEYS[name]
    x = call(place, means, dtype)
    keys = unseen(torch.arange(SEQLEN_K)).to(x.k.device)
    for t in (x.k, x.v):
        t[:, :, keys] = 0.0
    clean = features.run(x, backend)
    for t in (x.k, x.v):
        t[:, :, keys] = float("nan")
    got = features.run(x, backend)
    for output, a, b in zip(got._fields, got, clean, strict=True):
        if a is not None and b is not None:
            assert torch.equal(a, b) if backend == "triton" else torch.allclose(a, b, rtol=2e-2, atol=2e-2), output


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", ["mask", "causal", "bias of -inf", "block_mask"])
def test_a_bad_key_reaches_only_the_rows_that_see_it(place: Place, backend: str, name: str) -> None:
    x = call(place, EMPTY_ROWS[name][0], torch.float64)
    clean = features.run(x, backend)
    x.k[:, :, 20, 1], x.v[:, :, 21, 2] = float("nan"), float("inf")
    got, want = features.run(x, backend), oracle(x)
    assert torch.equal(got.o.isfinite(), want.o.isfinite())
    rows = want.o.isfinite().all(-1)
    assert rows.any() and not rows.all()
    assert torch.allclose(got.o[rows], clean.o[rows], rtol=1e-12, atol=1e-12)
    assert got.dq is not None and clean.dq is not None
    assert torch.allclose(got.dq[rows], clean.dq[rows], rtol=1e-12, atol=1e-12)


def test_a_row_whose_do_is_nan_spoils_no_key_that_it_cannot_see(place: Place, backend: str) -> None:
    x = call(place, mask_of(slice(5, 6), slice(0, 30)), torch.float64)
    clean = features.run(x, backend)
    assert x.do is not None
    x.do[:, :, 5] = float("nan")
    got = features.run(x, backend)
    for name in ("dk", "dv"):
        a, b = getattr(got, name), getattr(clean, name)
        assert torch.allclose(a[:, :, :30], b[:, :, :30], rtol=1e-12, atol=1e-12), name
        assert a[:, :, 30:].isnan().all(), name


def test_a_user_rule_that_hides_all_but_itself(place: Place, backend: str) -> None:
    x = call(place, lambda *_: {}, torch.float64)
    mod = features.make_mask_mod(place, SIZES, torch.float64)["mask_mod"]
    assert isinstance(mod, MaskMod)
    x.options["mask_mod"] = mod
    x.options["mask"] = place((torch.arange(SEQLEN_K) == 20)[None, None, None])
    got = features.run(x, backend)
    check(got, x)
    sees = (7 * torch.arange(SEQLEN_Q) + 60 + torch.arange(2)[:, None, None] + torch.arange(2)[:, None] + 2) % 4 != 0
    assert torch.equal(got.lse.isfinite().cpu(), sees)


def test_an_empty_segment_of_a_packed_call(place: Place, backend: str) -> None:
    x = features.call_of(place, ["packed"], Sizes(lengths=((5, 0), (0, 4), (3, 3), (2, 0))))
    got = features.run(x, backend)
    empty = torch.tensor([True] * 5 + [False] * 3 + [True] * 2, device=x.q.device)
    assert (got.o[empty] == 0).all() and (got.lse[:, empty] == float("-inf")).all()
    assert got.dq is not None and (got.dq[empty] == 0).all()
    assert got.dk is not None and (got.dk[:4] == 0).all()
    check(got, x)
