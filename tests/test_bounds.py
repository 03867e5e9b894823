"""The error rule goes red for what is wrong and stays green for what is right."""

from collections.abc import Callable

import pytest
import torch

from tests import bounds
from tests.bounds import Inputs, Outputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(dtype: torch.dtype) -> Inputs:
    q, do = torch.randn(2, 2, 4, 37, 40).to(dtype)
    k, v = torch.randn(2, 2, 2, 37, 40).to(dtype)
    return Inputs(q, k, v, do, torch.randn(2, 4, 37), {"causal": True})


def rounded(x: Inputs) -> Outputs:
    """The oracle's result in the dtypes that a call returns: as good as a result can be."""
    want = bounds.oracle(x)
    lse = want.lse if x.q.dtype == torch.float64 else want.lse.float()
    return Outputs(*(t.to(x.q.dtype) for t in want))._replace(lse=lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_possible_result_passes(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    bounds.check(rounded(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_attention_passes(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    bounds.check(bounds.standard(x), x)


def one_row(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[1, 1, 30] *= 1.3
    return t


def one_element(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[1, 1, 30, ...].view(-1)[0] += 0.1
    return t


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "a NaN": lambda t: t.where(torch.arange(t.shape[-1]) != 3, float("nan")),
    "an infinity": lambda t: t.where(torch.arange(t.shape[-1]) != 3, float("inf")),
    "rows turned round": lambda t: t.flip(2),
    "heads swapped": lambda t: t.flip(1),
    "another dtype": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "another shape": lambda t: t.unsqueeze(0),
    "two in a hundred too much": lambda t: t * 1.02,
    "one row thirty in a hundred too much": one_row,
    "one element": one_element,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", Outputs._fields)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_output_is_named(dtype: torch.dtype, name: str, fault: str) -> None:
    x = inputs(dtype)
    right = rounded(x)
    wrong = FAULTS[fault](getattr(right, name))
    lines = bounds.complaints(right._replace(**{name: wrong}), x)
    assert lines and all(line.startswith(f"{name}: ") for line in lines)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_too_many_or_too_few_is_seen_in_every_output(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    for q_offset in (-1, 1):
        lines = bounds.complaints(rounded(x._replace(options={"causal": True, "q_offset": q_offset})), x)
        assert {line.split(":")[0] for line in lines} == set(Outputs._fields)


def test_a_forgotten_gradient_of_lse_is_seen() -> None:
    x = inputs(torch.bfloat16)
    lines = bounds.complaints(rounded(x._replace(dlse=None)), x)
    assert {line.split(":")[0] for line in lines} == {"dq", "dk"}
