"""The forward's order `ahead`: the same sums in the same order as the classic one, whatever else a call asks for."""

from typing import Any

import pytest
import torch

from flash import ops
from flash.kernels.spec import Config
from flash.problem import Problem
from tests import calls, features
from tests.bounds import Outputs, check
from tests.calls import Place, random_inputs
from tests.features import Sizes

CLASSIC = Config(32, 16, 4, 1)
AHEAD = CLASSIC._replace(ahead=True)


def same_bits(place: Place, got: Outputs, want: Outputs) -> bool:
    """Whether o and lse agree: bit for bit where interpreted; compiled orders may contract otherwise."""
    if got.o.is_cuda:
        return True
    return torch.equal(got.o, want.o) and torch.equal(got.lse, want.lse)


@pytest.mark.sampled(8)
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", features.NAMES)
def test_every_feature_is_served(place: Place, name: str, dtype: torch.dtype) -> None:
    lengths = ((33, 50), (0, 3), (20, 70), (4, 0)) if name == "packed" else ()
    sizes = Sizes(batch=1, seqlen_q=33, seqlen_k=96, head_dim=32, head_dim_v=24, lengths=lengths)
    x = features.call_of(place, [name], sizes, dtype)
    both = [
        Outputs(*features.attention("triton", {"forward": config})(x.q, x.k, x.v, **x.options))
        for config in (AHEAD, CLASSIC)
    ]
    check(both[0], features.known(x))
    assert same_bits(place, *both)


@pytest.mark.sampled(2)
@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [0, 1, 15, 16, 17, 32, 33, 113])
def test_every_number_of_full_tiles(place: Place, seqlen_k: int, causal: bool) -> None:
    x = random_inputs(place, heads=4, seqlen_q=37, seqlen_k=seqlen_k, causal=causal)
    got = calls.forward(x, AHEAD)
    check(got, x)
    assert same_bits(place, got, calls.forward(x, CLASSIC))


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("names", ["k", "v", "kv"])
@pytest.mark.parametrize("key", [3, 17, 40])
def test_a_bad_key_reaches_only_the_rows_that_see_it(place: Place, names: str, poison: float, key: int) -> None:
    x = random_inputs(place, seqlen_q=63, causal=True)
    clean = calls.forward(x, AHEAD)
    for name in names:
        getattr(x, name)[0, 1, key, 3] = poison
    got, want = calls.forward(x, AHEAD), calls.forward(x, CLASSIC)
    assert torch.equal(got.o[:, 0], clean.o[:, 0]) and torch.equal(got.o[:, :, :key], clean.o[:, :, :key])
    assert torch.equal(got.lse[:, 0], clean.lse[:, 0]) and torch.equal(got.lse[:, :, :key], clean.lse[:, :, :key])
    assert torch.equal(got.o.isfinite(), want.o.isfinite()) and torch.equal(got.lse.isfinite(), want.lse.isfinite())
    assert not got.o[:, 1, key:].isfinite().all()


@pytest.mark.interpret(gpu=False)  # the interpreter counts the work
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 5)}])
def test_the_same_tiles_are_visited_once(place: Place, launches: list[Any], options: dict[str, Any]) -> None:
    x = random_inputs(place, seqlen_q=50, seqlen_k=113, **options)
    for config in (CLASSIC, AHEAD):
        calls.forward(x, config)
    assert launches[-1].dots == launches[-2].dots and launches[-1].loads == launches[-2].loads


@pytest.mark.parametrize("config", [None, AHEAD, CLASSIC, {"forward": AHEAD, "dq": CLASSIC}, {"dkdv": CLASSIC}])
def test_a_config_crosses_the_op_whole(config: Any) -> None:
    q = torch.zeros(1, 1, 4, 16)
    problem = Problem.of(q, q, q, config=config)
    numbers = ops.call_of(problem)[-1]
    assert all(type(number) is int for number in numbers)
    assert ops.configs_of(numbers) == problem.configs


@pytest.mark.parametrize("kernel", ["dkdv", "dq"])
def test_only_the_forward_has_this_order(kernel: str) -> None:
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=rf"config\['{kernel}'\].ahead must be one of \(False,\), got True"):
        Problem.of(q, q, q, config={kernel: AHEAD})
    with pytest.raises(ValueError, match=r"config\['forward'\].ahead must be one of .*, got 1"):
        Problem.of(q, q, q, config=CLASSIC._replace(ahead=1))  # type: ignore[arg-type]
