"""The Hopper backward against the oracle, its protocol against mutants, and what the compiler makes of it.

Without a GPU the Gluon kernel runs in the simulator (interpreter/gluon.py), the plain ones beside it interpreted. With
`-m gpu` the same bodies launch it on a GPU of capability 9.0.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from flash.kernels import hopper_backward
from flash.kernels.spec import Config, Configs, Gradients
from flash.problem import Problem
from tests import calls
from tests.bounds import Inputs, Outputs, check, complaints, oracle
from tests.calls import Place, random_inputs
from tests.interpreter.gluon import Simulated

Backward = Callable[..., Outputs]
GRADIENTS = ("dq", "dk", "dv")


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Backward:
    """Run the plain forward and the Hopper backward; edits and seed are the simulator's, needs are Gradients'."""
    if device.type == "cuda" and not on_hopper():
        pytest.skip("needs a GPU of capability 9.0")

    def run(
        x: Inputs,
        needs: tuple[bool, ...] = (True, True, True),
        slots: int = 2,
        found: Outputs | None = None,
        **simulation: Any,
    ) -> Outputs:
        if device.type == "cpu":
            simulated = Simulated(SHIPPED, **simulation)
            monkeypatch.setattr(hopper_backward, "backward_kernel", simulated)
        p = Problem.of(x.q, x.k, x.v, **x.options)
        wanted = Gradients(*needs, *[False] * (len(Gradients._fields) - len(needs)))
        assert hopper_backward.unserved(p.q, p.k, p.v, p.mods, p.spec, wanted, False) is None
        found = calls.forward(x) if found is None else found
        configs = Configs(calls.SMALL, Config(64, 128, 8, slots), calls.SMALL)
        gradients = hopper_backward.backward(
            x.do, x.dlse, p.q, p.k, p.v, found.o, found.lse, p.mods, p.spec, p.scale, p.positions, configs, wanted
        )
        return Outputs(found.o, found.lse, *gradients)

    return run


SHIPPED = hopper_backward.backward_kernel


@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_those_of_standard_attention(
    place: Place, backward: Backward, dtype: torch.dtype, head_dim: int, causal: bool
) -> None:
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=130, head_dim=head_dim, dtype=dtype, causal=causal)
    check(backward(x), x)
