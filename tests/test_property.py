"""Calls drawn at random: shapes, strides, positions, tile sizes and three features together, against the oracle.

In float64, where the oracle leaves no room for chance; on a CPU every access is checked as always.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash.kernels.spec import Config, Configs
from tests import calls, features
from tests.bounds import Inputs, check
from tests.calls import Place, random_inputs

BLOCKS = st.sampled_from([16, 32])
TILE = {"block_m": BLOCKS, "block_n": BLOCKS, "num_warps": st.just(4), "num_stages": st.just(1)}
FORWARDS, BACKWARDS = (st.builds(Config, **TILE, ahead=ahead) for ahead in (st.booleans(), st.just(False)))
CONFIGS = st.builds(Configs, forward=FORWARDS, dkdv=BACKWARDS, dq=BACKWARDS)
LENGTHS = st.one_of(st.integers(0, 70), st.sampled_from([1, 15, 16, 17, 31, 32, 33, 48, 64]))
SCALES = st.one_of(st.none(), st.sampled_from([0.0, -0.7, 1e-38, 3.0]))
STRIDES = list(calls.strided(lambda x: x, (1, 1, 1, 1), torch.float64))


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    """The keywords of `random_inputs`, and how q, k, v and do lie in memory."""
    heads_k, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seqlen_q, seqlen_k = draw(LENGTHS), draw(LENGTHS)
    position = st.integers(-seqlen_q - 2, seqlen_k + 2)
    tensor = st.lists(position, min_size=batch, max_size=batch).map(torch.tensor)
    return {
        "batch": batch,
        "heads": heads_k * draw(st.integers(1, 3)),
        "heads_k": heads_k,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "head_dim": draw(st.integers(1, 40)),
        "head_dim_v": draw(st.integers(1, 40)),
        "causal": draw(st.booleans()),
        "q_offset": draw(st.one_of(st.none(), position, tensor)),
        "scale": draw(SCALES),
        "strides": draw(st.lists(st.sampled_from(STRIDES), min_size=4, max_size=4)),
    }


def hold(place: Place, keywords: dict[str, Any], configs: Configs) -> None:
    """Run forward and backward and compare every output with the oracle."""
    keywords = dict(keywords)
    strides = keywords.pop("strides")
    if isinstance(keywords["q_offset"], torch.Tensor):
        keywords["q_offset"] = place(keywords["q_offset"])
    x = random_inputs(place, dtype=torch.float64, **keywords)
    laid = []
    for tensor, name in zip((x.q, x.k, x.v, x.do), strides, strict=True):
        assert tensor is not None
        laid.append(calls.strided(place, (*tensor.shape,), tensor.dtype)[name].copy_(tensor))
    x = Inputs(*laid, x.dlse, x.options)
    check(calls.backward(x, configs), x)


CALLS = given(drawn(), CONFIGS)
COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.interpret
@settings(COMMON, max_examples=8)
@CALLS
def test_a_drawn_call_equals_the_oracle(place: Place, keywords: dict[str, Any], configs: Configs) -> None:
    hold(place, keywords, configs)


@pytest.mark.interpret
@pytest.mark.slow
@settings(COMMON, max_examples=400)
@CALLS
def test_many_drawn_calls_equal_the_oracle(place: Place, keywords: dict[str, Any], configs: Configs) -> None:
    hold(place, keywords, configs)


@st.composite
def triples(draw: st.DrawFn) -> tuple[list[str], features.Sizes, int]:
    """Three features that go together, the sizes of a call and a seed."""
    names = draw(st.lists(st.sampled_from(features.NAMES), min_size=3, max_size=3, unique=True))
    shortest = int("block_mask" in names)  # torch makes no block mask over an axis without a row
    length = st.one_of(st.integers(shortest, 40), st.sampled_from([1, 15, 16, 17, 31, 32, 33]))
    heads_k = draw(st.integers(1, 2))
    sizes = features.Sizes(
        batch=draw(st.integers(1, 3)),
        heads=heads_k * draw(st.integers(1, 2)),
        heads_k=heads_k,
        seqlen_q=draw(length),
        seqlen_k=draw(length),
        head_dim=draw(st.integers(1, 24)),
        head_dim_v=draw(st.integers(1, 24)),
    )
    if "packed" in names:
        pairs = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
        sizes = sizes._replace(lengths=tuple(pairs))
    return names, sizes, draw(st.integers(0, 2**16))


def hold_triple(place: Place, backend: str, drawn: tuple[list[str], features.Sizes, int], configs: Configs) -> None:
    """Run forward and backward of a call with these features and compare every output with the oracle."""
    names, sizes, seed = drawn
    torch.manual_seed(seed)
    x = features.call_of(place, names, sizes)
    check(features.run(x, backend, configs._asdict()), features.known(x))


BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
TRIPLES = given(triples(), CONFIGS)


@BOTH
@settings(COMMON, max_examples=6)
@TRIPLES
def test_three_features_drawn_together_equal_the_oracle(
    place: Place, backend: str, drawn: tuple[list[str], features.Sizes, int], configs: Configs
) -> None:
    hold_triple(place, backend, drawn, configs)


@BOTH
@pytest.mark.slow
@settings(COMMON, max_examples=500)
@TRIPLES
def test_many_triples_of_features_equal_the_oracle(
    place: Place, backend: str, drawn: tuple[list[str], features.Sizes, int], configs: Configs
) -> None:
    hold_triple(place, backend, drawn, configs)
