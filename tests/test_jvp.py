"""Forward mode: tangents of o and lse against the oracle's, for every feature, on both backends."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from flash import dispatch, reference
from flash.kernels.spec import Gradients
from flash.problem import Problem
from tests import bounds, calls, features
from tests.bounds import Inputs
from tests.calls import Place

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])


def oracle(x: Inputs) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    def attention(*args: Any, **options: Any) -> Any:
        return reference.attention(*args, return_lse=True, **options)

    return features.of_operands(bounds.dense_or_packed(attention), bounds.widened(features.known(x)))


def directions(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn_like(x) for x in tensors)


def moved(x: Inputs) -> Inputs:
    """x along a random direction of all its operands, in forward mode alone."""
    named = features.differentiable(x)
    return x._replace(do=None, dlse=None, tangents={name: torch.randn_like(t) for name, t in named.items()})


def compare(x: Inputs, backend: str) -> None:
    """The tangents of a call, along a random direction of all its operands, with those of the oracle."""
    x = moved(x)
    bounds.check(bounds.tangents_of(features.attention(backend), x), features.known(x))


def launched(x: Inputs, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of o and lse as a backend fills them, from x's tangents as they lie in memory."""
    assert x.tangents is not None
    problem = Problem.of(x.q, x.k, x.v, **x.options, backend=backend, config=features.TILES)
    tangents = {name: x.tangents.get(name) for name in Gradients._fields}
    if tangents["bias"] is not None or tangents["alibi_slopes"] is not None:
        raise ValueError("Problem may have changed their shapes")
    return dispatch.jvp(problem, Gradients(**tangents), *dispatch.forward(problem))


@BOTH
@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", ["plain", *features.NAMES])
def test_tangents_of_every_feature_are_the_oracle_s(place: Place, backend: str, name: str) -> None:
    compare(features.call_of(place, [] if name == "plain" else [name]), backend)


@pytest.mark.sampled(27, all=True)
@BOTH
@pytest.mark.parametrize("pair", features.PAIRS, ids="-".join)
def test_tangents_of_every_pair_of_features_are_the_oracle_s(place: Place, backend: str, pair: tuple[str, str]) -> None:
    compare(features.call_of(place, pair), backend)


@BOTH
@pytest.mark.sampled(3)
@pytest.mark.parametrize("operand", ["q", "k", "v", "bias", "alibi_slopes", "sinks"])
def test_each_operand_has_a_tangent_of_its_own(place: Place, backend: str, operand: str) -> None:
    x = features.call_of(place, ["bias", "alibi_slopes", "sinks", "causal"])
    at = list(features.differentiable(x)).index(operand)
    results = []
    for function, tensors in (features.of_operands(features.attention(backend), x), oracle(x)):
        alone = lambda t, function=function, tensors=tensors: function(*tensors[:at], t, *tensors[at + 1 :])  # noqa: E731
        torch.manual_seed(3)
        results.append(torch.func.jvp(alone, (tensors[at],), (torch.randn_like(tensors[at]),))[1])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", features.NAMES)
def test_tangents_and_gradients_are_each_other_s_transpose(place: Place, backend: str, name: str) -> None:
    x = features.call_of(place, [name])
    function, tensors = features.of_operands(features.attention(backend), x)
    along = directions(tensors)
    outputs, moved = torch.func.jvp(function, tuple(tensors), along)
    back = directions(list(outputs))
    leaves = [t.detach().requires_grad_() for t in tensors]
    found = torch.autograd.grad(function(*leaves), leaves, back)
    forward = sum((u * t).sum() for u, t in zip(back, moved, strict=True))
    backward = sum((g * t).sum() for g, t in zip(found, along, strict=True))
    assert_close(forward, backward, rtol=1e-11, atol=1e-11)


LONG = features.Sizes(1, 2, 1, 45, 63, 32, 32)
LENGTHS = [(0, 0), (0, 17), (17, 0), (1, 0), (1, 1), (1, 63), (63, 1), (17, 17), (17, 63), (63, 17), (63, 63)]


@BOTH
@pytest.mark.sampled(14)
@pytest.mark.parametrize("names", [[], ["causal", "groups"], ["bias", "softcap"], ["sinks", "dropout_p"], ["packed"]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tangents_are_as_near_to_the_oracle_as_standard_attention_s(
    place: Place, backend: str, dtype: torch.dtype, names: list[str]
) -> None:
    compare(features.call_of(place, names, LONG if "packed" not in names else features.SIZES, dtype), backend)


@BOTH
@pytest.mark.sampled(5)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_tangents_at_every_length(place: Place, backend: str, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    sizes = features.SIZES._replace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    compare(features.call_of(place, ["causal"] if causal else [], sizes), backend)


@BOTH
@pytest.mark.sampled(10)
@pytest.mark.parametrize("hiding", ["causal", "window", "mask", "block_mask", "packed"])
def test_nan_reaches_the_tangents_of_rows_that_see_it_and_no_others(place: Place, backend: str, hiding: str) -> None:
    names = {"packed", "causal"} if hiding == "packed" else {hiding}
    sizes = features.SIZES._replace(batch=1, heads=6, heads_k=6, seqlen_k=37)
    x = moved(features.call_of(place, names, sizes))
    assert x.tangents is not None
    clean = bounds.tangents_of(features.attention(backend), x)
    for head, operand in enumerate((x.q, x.k, x.v, *x.tangents.values())):
        rows = operand if hiding == "packed" else operand[0].transpose(0, 1)
        rows[len(rows) * 2 // 3, head] = math.nan
    got, want = bounds.tangents_of(features.attention(backend), x), bounds.oracle(x)
    for ours, theirs, before in ((got.to, want.to, clean.to), (got.tlse, want.tlse, clean.tlse)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert_close(ours, before.where(ours.isfinite(), math.nan), rtol=1e-12, atol=1e-12, equal_nan=True)
    reached = got.to.isnan().movedim(0 if hiding == "packed" else 2, -1).flatten(-2)
    assert bool(reached.any(-1).all()) and not bool(reached.all(-1).any())


@BOTH
@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", [name for name in calls.strided(lambda x: x, (1, 1, 1, 1), torch.float32)])
def test_tangents_of_any_strides_give_the_same_result(place: Place, backend: str, kind: str) -> None:
    x = moved(features.call_of(place, ["causal"], features.SIZES._replace(batch=1)))
    assert x.tangents is not None
    expected = launched(x, backend)
    laid = {}
    for name, t in x.tangents.items():
        laid[name] = calls.strided(place, t.shape, t.dtype)[kind].copy_(t)
    for ours, theirs in zip(launched(x._replace(tangents=laid), backend), expected, strict=True):
        tolerance = 0.0 if backend == "triton" else 1e-12  # torch's own products depend on strides
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_tangents_of_rows_without_keys_are_zero_and_the_sink_s(place: Place, backend: str, sinks: bool) -> None:
    x = features.call_of(place, ["causal", *["sinks"] * sinks])
    x = moved(x._replace(options={**x.options, "q_offset": -5}))
    assert x.tangents is not None
    to, tlse = launched(x, backend)
    assert bool((to[:, :, :5] == 0).all()) and bool((to[:, :, 5:] != 0).any())
    expected = x.tangents["sinks"][:, None].expand(2, 5) if sinks else torch.zeros(2, 5, dtype=tlse.dtype)
    assert_close(tlse[:, :, :5], expected.to(tlse.device).expand(2, 2, 5))


@BOTH
def test_tangents_of_a_bad_sequence_alone_are_nan(place: Place, backend: str) -> None:
    x = features.call_of(place, ["packed", "causal", "bias"])
    hostile = {
        "cu_seqlens_q": torch.tensor([0, 5, 3, 14, 16], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 7, 10, 12, 18], dtype=torch.int32),
    }
    x = moved(x._replace(options={**x.options, **{name: place(t) for name, t in hostile.items()}}))
    got, want = bounds.tangents_of(features.attention(backend), x), bounds.oracle(x)
    bad = torch.arange(18, device=x.q.device)[:, None] < 14
    assert torch.equal(want.tlse.isnan(), bad.T.expand(2, 18) & (torch.arange(18, device=x.q.device) >= 5))
    for ours, theirs in ((got.to, want.to), (got.tlse, want.tlse)):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_call_that_the_kernel_cannot_serve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 1, 4, 8)
    o, lse = torch.zeros_like(x), torch.zeros(1, 1, 4)
    tangents = Gradients(x, None, None)
    with pytest.raises(NotImplementedError, match="no forward mode; use backend='auto'"):
        dispatch.jvp(Problem.of(x, x, x, backend="hopper"), tangents, o, lse)
    problem = Problem.of(x, x, x, backend="triton")
    monkeypatch.setattr(dispatch, "triton_refuses", lambda *call: None)
    monkeypatch.setattr(dispatch, "too_wide", lambda *call: "its smallest tiles do not fit")
    with pytest.raises(NotImplementedError, match="smallest tiles do not fit; use backend='auto', which takes 'torch'"):
        dispatch.jvp(problem, tangents, o, lse)
    problem = Problem.of(x, x, x)
    for name in ("q", "k", "v"):
        assert getattr(problem, name).device.type == "cpu"
    assert dispatch.plain(problem) == "torch"
    assert dispatch.jvp(problem, tangents, o, lse)[0].shape == o.shape
