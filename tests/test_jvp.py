"""Forward mode: tangents of o and lse against the oracle's, for every feature, on both backends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from flash import reference
from tests import bounds, features
from tests.bounds import Inputs
from tests.calls import Place

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])


def oracle(x: Inputs) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    def attention(*args: Any, **options: Any) -> Any:
        return reference.attention(*args, return_lse=True, **options)

    return features.of_operands(bounds.dense_or_packed(attention), bounds.widened(features.known(x)))


def directions(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn_like(x) for x in tensors)


def compare(x: Inputs, backend: str, rtol: float = 1e-12) -> None:
    """The tangents of a call, along a random direction of all its operands, with those of the oracle."""
    function, tensors = features.of_operands(features.attention(backend), x)
    expected, wide = oracle(x)
    along = directions(tensors)
    _, got = torch.func.jvp(function, tuple(tensors), along)
    _, want = torch.func.jvp(expected, tuple(wide), tuple(t.double() for t in along))
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= rtol * (1 + theirs.abs().max())


@BOTH
@pytest.mark.parametrize("name", ["plain", *features.NAMES])
def test_tangents_of_every_feature_are_the_oracle_s(place: Place, backend: str, name: str) -> None:
    compare(features.call_of(place, [] if name == "plain" else [name]), backend)


@BOTH
@pytest.mark.sampled(6)
@pytest.mark.parametrize("pair", features.PAIRS, ids="-".join)
def test_tangents_of_every_pair_of_features_are_the_oracle_s(place: Place, backend: str, pair: tuple[str, str]) -> None:
    compare(features.call_of(place, pair), backend)


@BOTH
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
