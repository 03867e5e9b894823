"""Every feature with every other: gradients against finite differences, and every output against the oracle."""

import pytest

from tests import features
from tests.bounds import check
from tests.calls import Place

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
INTERPRETED_SLOWLY = pytest.param("triton", marks=[pytest.mark.interpret, pytest.mark.slow])


@pytest.mark.parametrize("backend", ["torch", INTERPRETED_SLOWLY])
@pytest.mark.parametrize("name", features.NAMES)
def test_a_feature_alone_passes_gradcheck(place: Place, backend: str, name: str) -> None:
    features.gradcheck(features.call_of(place, [name]), backend)


@BOTH
@pytest.mark.slow  # finite differences operand by operand; below, all operands at once
@pytest.mark.parametrize("pair", features.PAIRS, ids="-".join)
def test_a_pair_of_features_passes_gradcheck(place: Place, backend: str, pair: tuple[str, str]) -> None:
    features.gradcheck(features.call_of(place, pair), backend)


# every fourth at once, all of them where there is time
SAMPLED = [pytest.param(pair, marks=[pytest.mark.slow] if n % 4 else []) for n, pair in enumerate(features.PAIRS)]


@pytest.mark.sampled(12)
@BOTH
@pytest.mark.parametrize("pair", SAMPLED, ids="-".join)
def test_a_pair_of_features_is_right_in_value_and_in_slope(place: Place, backend: str, pair: tuple[str, str]) -> None:
    x = features.call_of(place, pair)
    got = features.run(x, backend)
    check(got, features.known(x))
    features.slope(x, got, backend)


@pytest.mark.sampled(3)
@BOTH
@pytest.mark.parametrize("packed", [False, True])
def test_every_feature_at_once_is_right_in_value_and_in_slope(place: Place, backend: str, packed: bool) -> None:
    x = features.call_of(place, [name for name in features.NAMES if name != "mask" and (packed or name != "packed")])
    got = features.run(x, backend)
    check(got, features.known(x))
    features.slope(x, got, backend)
