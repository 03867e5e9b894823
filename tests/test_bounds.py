"""The error rule goes red for what is wrong and stays green for what is right."""

import math
from collections.abc import Callable

import pytest
import torch

from tests import bounds
from tests.bounds import Inputs, Outputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(dtype: torch.dtype, operands: torch.dtype | None = None) -> Inputs:
    q, do = torch.randn(2, 2, 4, 37, 40).to(dtype)
    k, v = torch.randn(2, 2, 2, 37, 40).to(dtype)
    sizes = {"bias": (1, 4, 37, 1), "alibi_slopes": (2, 4), "sinks": (4,)}
    options = {name: torch.randn(size).to(operands or dtype) for name, size in sizes.items()}
    return along(Inputs(q, k, v, do, torch.randn(2, 4, 37), {"causal": True, **options}))


def along(x: Inputs) -> Inputs:
    """x with a tangent of every operand; that of a slope, which distances multiply, is small."""
    named = {"q": x.q, "k": x.k, "v": x.v, **{name: x.options[name] for name in bounds.OPERANDS if name in x.options}}
    return x._replace(tangents={n: torch.randn_like(t) / (40 if n == "alibi_slopes" else 1) for n, t in named.items()})


def packed(dtype: torch.dtype) -> Inputs:
    """Sequences of 9, 0, 17 and 11 queries; the keys end before the last sequence."""
    x = inputs(dtype)
    q, k, v, do = (t[0].transpose(0, 1) for t in (x.q, x.k, x.v, x.do))
    starts = {"cu_seqlens_q": torch.tensor([0, 9, 9, 26, 37]), "cu_seqlens_k": torch.tensor([0, 20, 23, 37, 37])}
    options = {
        **x.options,
        **starts,
        "bias": torch.randn(4, 1, 1, 20).to(dtype),
        "max_seqlen_q": 17,
        "max_seqlen_k": 20,
    }
    options["alibi_slopes"] = torch.randn(4, 4).to(dtype)
    return along(Inputs(q, k, v, do, torch.randn(4, 37), options))


def rounded(x: Inputs) -> Outputs:
    """The oracle's result in the dtypes that a call returns: as good as a result can be."""
    want = bounds.oracle(x)
    rows = {name: getattr(want, name) for name in ("lse", "tlse")}
    if x.q.dtype != torch.float64:
        rows = {name: t if t is None else t.float() for name, t in rows.items()}
    own = {f"d{name}": x.options[name].dtype for name in bounds.OPERANDS if name in x.options}
    dtypes = (own.get(name, x.q.dtype) for name in Outputs._fields)
    return Outputs(*(t if t is None else t.to(dtype) for t, dtype in zip(want, dtypes, strict=True)))._replace(**rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_possible_result_passes(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    bounds.check(rounded(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_attention_passes(dtype: torch.dtype) -> None:
    x = inputs(dtype)
    bounds.check(bounds.standard(x), x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_held_likewise(dtype: torch.dtype) -> None:
    x = packed(dtype)
    bounds.check(rounded(x), x)
    bounds.check(bounds.standard(x), x)
    for name in Outputs._fields:
        wrong = getattr(rounded(x), name) * 1.1
        assert bounds.complaints(rounded(x)._replace(**{name: wrong}), x)


@pytest.mark.parametrize(("dtype", "operands"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_an_operand_of_another_dtype_is_held_to_the_coarser(dtype: torch.dtype, operands: torch.dtype) -> None:
    x = inputs(dtype, operands)
    bounds.check(rounded(x), x)
    assert rounded(x).dbias.dtype == operands
    for name in ("dbias", "dalibi_slopes", "dsinks"):
        wrong = getattr(rounded(x), name) * 1.1
        assert bounds.complaints(rounded(x)._replace(**{name: wrong}), x)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_chance_foretells_the_error_of_standard_attention(dtype: torch.dtype) -> None:
    for name in bounds.OPERANDS:
        ratios = []
        for seed in range(6):
            torch.manual_seed(seed)
            x = inputs(dtype)
            error = getattr(bounds.standard(x), f"d{name}").double() - getattr(bounds.oracle(x), f"d{name}")
            sure = 1 + 3 / math.sqrt(2 * error.numel())
            ratios.append(float(bounds.rms(error) / bounds.rms(bounds.likely(x)[f"d{name}"]) * sure))
        assert 0.5 < sorted(ratios)[len(ratios) // 2] < 1.5


def test_a_sum_that_standard_attention_has_right_by_luck_may_have_its_usual_error() -> None:
    want, error = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.01, -0.01], dtype=torch.float64)
    got = (want + error).float()
    assert bounds.judge(got, want, want.float(), torch.float32, 0.0)
    assert not bounds.judge(got, want, want.float(), torch.float32, 0.0, chance=error.abs())
    assert bounds.judge(got, want, want.float(), torch.float32, 0.0, chance=error.abs() / 4)


def spot(t: torch.Tensor) -> tuple[int, ...]:
    """Far into every axis, where most numbers of causal attention are no zeros."""
    return tuple(n * 4 // 5 for n in t.shape)


def one_row(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[spot(t)[:-1]] *= 1.3
    return t


def one_element(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[spot(t)] += 0.1 * max(1.0, float(t.double().std()))
    return t


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "a NaN": lambda t: t.where(torch.arange(t.numel()).view(t.shape) != t.numel() // 2, float("nan")),
    "an infinity": lambda t: t.where(torch.arange(t.numel()).view(t.shape) != t.numel() // 2, float("inf")),
    "rows turned round": lambda t: t.flip(2 if t.dim() > 2 else -1),
    "heads swapped": lambda t: t.flip(1 if t.dim() > 1 else 0),
    "another dtype": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "another shape": lambda t: t.unsqueeze(0),
    "two in a hundred too much": lambda t: t * 1.02,
    "eight in a hundred too much": lambda t: t * 1.08,
    "one row thirty in a hundred too much": one_row,
    "one element": one_element,
}


CASES = [
    (name, fault)
    for name in Outputs._fields
    for fault in FAULTS
    if not (fault.startswith("two in a hundred") and name[1:] in bounds.OPERANDS)  # four sums: standard has as much
]


@pytest.mark.sampled(6, all=True)
@pytest.mark.parametrize(("name", "fault"), CASES)
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
        lines = bounds.complaints(rounded(x._replace(options={**x.options, "q_offset": q_offset})), x)
        assert {line.split(":")[0] for line in lines} == set(Outputs._fields)


def test_a_forgotten_gradient_of_lse_is_seen() -> None:
    x = inputs(torch.bfloat16)
    lines = bounds.complaints(rounded(x._replace(dlse=None)), x)
    assert {line.split(":")[0] for line in lines} == {"dq", "dk", "dbias", "dalibi_slopes", "dsinks"}
