"""The same call gives the same bits 250 times: a race between warps is what no interpreter and no simulator can see.

The Hopper backward promises no order of dq's sums; all that is found besides repeats, by either backend.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from flash.attention import flash_attention
from flash.problem import Problem
from tests.bounds import Inputs, Outputs, differentiate
from tests.calls import Place, random_inputs

TIMES = 250
SHAPES: dict[str, dict[str, Any]] = {
    "64, full": {"head_dim": 64, "seqlen_q": 512},
    "64, causal": {"head_dim": 64, "seqlen_q": 1000, "causal": True, "dtype": torch.float16},
    "64, causal, groups of 4": {"head_dim": 64, "heads_k": 2, "seqlen_q": 777, "causal": True},
    "64, window": {"head_dim": 64, "seqlen_q": 1000, "window": (200, 0)},
    "64, causal, softcap": {"head_dim": 64, "seqlen_q": 600, "causal": True, "softcap": 20.0, "dtype": torch.float16},
    "64, few queries": {"head_dim": 64, "seqlen_q": 130, "seqlen_k": 1500},
    "128, full": {"head_dim": 128, "seqlen_q": 512},
    "128, causal": {"head_dim": 128, "seqlen_q": 1000, "causal": True, "dtype": torch.float16},
    "128, causal, one key head": {"head_dim": 128, "heads_k": 1, "seqlen_q": 900, "causal": True},
    "128, two-sided window, sinks": {"head_dim": 128, "seqlen_q": 700, "window": (100, 50), "sinks": torch.zeros(8)},
    "96, causal from position 300": {"head_dim": 96, "seqlen_q": 400, "seqlen_k": 700, "causal": True, "q_offset": 300},
    "256, causal": {"head_dim": 256, "seqlen_q": 500, "causal": True},
}


def inputs(place: Place, shape: str) -> Inputs:
    options = {name: place(value) if name == "sinks" else value for name, value in SHAPES[shape].items()}
    return random_inputs(place, **{"batch": 2, "heads": 8, "heads_k": 8, "dtype": torch.bfloat16, **options})


def by(backend: str) -> Callable[..., Any]:
    return lambda q, k, v, **options: flash_attention(q, k, v, return_lse=True, backend=backend, **options)


def assert_repeats(call: Callable[[], Outputs], times: int, loose: tuple[str, ...] = ()) -> None:
    """Every output but the loose ones has the bits of the first call."""
    first = call()
    for n in range(1, times):
        for name, a, b in zip(first._fields, first, call(), strict=True):
            assert a is None or name in loose or torch.equal(a, b), f"{name} of call {n}"


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_call_gives_the_same_bits(place: Place, guard_bands: Any, shape: str, backend: str, part: str) -> None:
    x = inputs(place, shape)
    if part == "forward":
        x = x._replace(do=None, dlse=None)

    def call() -> Outputs:
        guard_bands.check()  # and forget what the call before allocated
        return differentiate(by(backend), x)

    try:
        call()
    except NotImplementedError as reason:
        pytest.skip(f"needs a backend that serves it: {reason}")
    assert_repeats(call, TIMES, ("dq",) if backend == "hopper" else ())


def test_the_hopper_kernels_serve_these_shapes_but_for_one_backward() -> None:
    """Elsewhere than on Hopper all of theirs are skipped; there no more than that one."""
    pytest.importorskip("triton.experimental.gluon")
    from flash.kernels import hopper_backward, hopper_forward
    from flash.kernels.spec import Gradients

    refused = []
    for shape in SHAPES:
        x = inputs(lambda t: t, shape)
        p = Problem.of(x.q, x.k, x.v, **x.options)
        assert hopper_forward.unserved(p.q, p.k, p.v, p.mods, p.spec) is None, shape
        needs = Gradients(True, True, True)
        if hopper_backward.unserved(p.q, p.k, p.v, p.mods, p.spec, needs, False):
            refused.append(shape)
    assert len(SHAPES) == 12 and refused == ["256, causal"]


def test_what_does_not_repeat_is_seen() -> None:
    x = random_inputs(lambda t: t, seqlen_q=9, head_dim=8)
    noise = count()

    def call() -> Outputs:
        got = differentiate(by("torch"), x)
        assert got.dq is not None
        return got._replace(dq=got.dq + next(noise) // 3)

    assert_repeats(call, 4, loose=("dq",))
    with pytest.raises(AssertionError, match="dq of call 2"):
        assert_repeats(call, 4)
