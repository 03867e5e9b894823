"""The gate before every timing: o and the gradients against the float64 oracle.

    max |x - oracle| <= 2 max |standard - oracle| + 8 eps(float32) max |operands|        x in o, dq, dk, dv

`standard` is standard attention in the case's own dtype on the same numbers. The second term keeps the bound above zero
where standard attention happens to be exact. A long case is compared on its first and last key head, at full length.
"""

import math
from dataclasses import dataclass

import torch

from bench.cases import Case
from bench.peers import causal_hidden, standard_attention

NAMES = ("o", "dq", "dk", "dv")
FLOOR = 8 * torch.finfo(torch.float32).eps
SCORES_CHECKED_WHOLE = {"cpu": 2**24, "cuda": 2**31}  # above it, two key heads: the oracle costs time, not memory
SCORES_AT_ONCE = 2**25  # float64 numbers in one matrix of the oracle


@dataclass(frozen=True)
class Slice:
    """The oracle for one key head and the query heads that share it."""

    batch: int
    head_k: int
    expected: dict[str, torch.Tensor]  # NAMES -> float64
    bounds: dict[str, float]


@dataclass(frozen=True)
class Expected:
    """What a case's results are held to, and a sentence saying how much of them."""

    slices: list[Slice]
    extent: str


@dataclass(frozen=True)
class Verdict:
    """Largest errors by name, each with its bound; ok when none is above."""

    ok: bool
    errors: dict[str, float]
    bounds: dict[str, float]


def oracle(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> dict[str, torch.Tensor]:
    """flash.reference.attention and its gradients in float64, some rows of queries at a time."""
    from flash.reference import attention

    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    rows = max(SCORES_AT_ONCE // (case.seqlen_k * case.group), 1)
    outputs = []
    for start in range(0, case.seqlen_q, rows):
        stop = min(start + rows, case.seqlen_q)
        offset = start + case.seqlen_k - case.seqlen_q
        o = attention(q[:, :, start:stop], k, v, causal=case.causal, q_offset=offset)
        o.backward(do[:, :, start:stop].double())
        outputs.append(o.detach())
    grads = (x.grad if x.grad is not None else torch.zeros_like(x) for x in (q, k, v))
    return dict(zip(NAMES, (torch.cat(outputs, 2), *grads), strict=True))


def standard(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Standard attention and its gradients in the case's dtype."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = standard_attention(q, k, v, causal_hidden(case, q.device))
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, (q, k, v), do)), strict=True))


def pick(case: Case, x: torch.Tensor, batch: int, head_k: int) -> torch.Tensor:
    """The heads of x [batch, heads or heads_k, ...] that belong to one key head -> [1, group or 1, ...]."""
    width = x.shape[1] // case.heads_k
    return x[batch : batch + 1, head_k * width : (head_k + 1) * width]


def expect(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> Expected:
    """Runs the oracle and standard attention once; every peer is compared with the result."""
    scores = case.batch * case.heads * case.seqlen_q * case.seqlen_k
    where = [(b, h) for b in range(case.batch) for h in range(case.heads_k)]
    extent = "every head"
    if scores > SCORES_CHECKED_WHOLE[q.device.type] and len(where) > 2:
        where = [where[0], where[-1]]
        extent = "the first key head of the first sequence and the last of the last, at full length"
    slices = []
    for batch, head_k in where:
        operands = [pick(case, x.detach(), batch, head_k) for x in (q, k, v, do)]
        expected = oracle(case, *operands)
        own = standard(case, *operands)
        floor = FLOOR * max(float(x.abs().max()) for x in operands)
        bounds = {name: 2 * float((own[name].double() - expected[name]).abs().max()) + floor for name in NAMES}
        slices.append(Slice(batch, head_k, expected, bounds))
    return Expected(slices, extent)


def compare(case: Case, expected: Expected, results: dict[str, torch.Tensor]) -> Verdict:
    """Compares results (all of NAMES, or o alone) with the oracle; a NaN is an error above every bound."""
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    ok = True
    for part in expected.slices:
        for name, x in results.items():
            ours = pick(case, x.detach(), part.batch, part.head_k).double()
            if ours.shape != part.expected[name].shape:
                raise ValueError(f"{name} must have shape {tuple(part.expected[name].shape)}, got {tuple(ours.shape)}")
            error, bound = float((ours - part.expected[name]).abs().max()), part.bounds[name]
            ok = ok and error <= bound
            if error > errors.get(name, -1.0) or math.isnan(error):
                errors[name], bounds[name] = error, bound
    return Verdict(ok, errors, bounds)
