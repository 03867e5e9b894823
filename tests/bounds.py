"""How wrong a result may be: no more than standard attention in the same dtype, both measured against float64.

    want    the oracle, float64, of the very inputs the kernel saw (made in the tested dtype, then upcast)
    plain   standard attention in the tested dtype: all scores in memory, softmax, autograd's gradients
    e, e_0  errors of the result and of `plain`; u an ulp of max|want|; f the floor below

    float16, bfloat16    rms(e) <= rms(e_0) + f              max(e) <= max(e_0) + u + f
    float32              rms(e) <= 1.25 rms(e_0) + f         max(e) <= 2 max(e_0) + f
    float64              max(e) <= 1e-12 (1 + max|want|)

On a GPU, where exp2 is approximate, float32 has 2 instead of 1.25. A mean forgives one wrong row among many, so rows
are held too: the rms over a row is at most 6 times what that row, or a typical one, has in `plain`. One rounding (of
delta, of lse) can move a whole row, so these are six standard deviations of one normal number.

The floor is 8 eps of the accumulator times the largest number that enters the sum: where standard attention happens to
be exact (one key), rounding of the sums is still allowed. lse is float32 for half-precision inputs too, and held to it.
"""

import math
from typing import Any, NamedTuple

import torch

from flash import reference

RMS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.25}


class Outputs(NamedTuple):
    """What a call returns and what its backward pass finds; None where it was not asked for."""

    o: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


class Inputs(NamedTuple):
    """A call: tensors, the gradients that come back, and the keywords of `flash_attention`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    options: dict[str, Any] = {}  # never written to


def differentiate(attention: Any, x: Inputs) -> Outputs:
    """Run (q, k, v, **options) -> (o, lse) and, where x brings do, its backward pass."""
    q, k, v = (t.detach().requires_grad_(x.do is not None) for t in (x.q, x.k, x.v))
    o, lse = attention(q, k, v, **x.options)
    if x.do is None:
        return Outputs(o, lse)
    outputs, gradients = [o], [x.do.to(o.dtype)]
    if x.dlse is not None:
        outputs, gradients = [o, lse], [x.do.to(o.dtype), x.dlse.to(lse.dtype)]
    found = torch.autograd.grad(outputs, (q, k, v), gradients, allow_unused=True)
    grads = (torch.zeros_like(t) if g is None else g for t, g in zip((q, k, v), found, strict=True))
    return Outputs(o.detach(), lse.detach(), *grads)


def oracle(x: Inputs) -> Outputs:
    """The result in float64."""

    def attention(*args: Any, **options: Any) -> Any:
        return reference.attention(*args, return_lse=True, **options)

    tensors = (None if t is None else t.double() for t in x[:5])
    return differentiate(attention, Inputs(*tensors, options=x.options))


def standard(x: Inputs) -> Outputs:
    """Standard attention in the inputs' dtype; lse from float32 scores, as lse itself is float32."""
    found = differentiate(materialised, x)
    if x.q.dtype in (torch.float16, torch.bfloat16):
        _, lse = materialised(x.q.float(), x.k.float(), x.v.float(), **x.options)
        found = found._replace(lse=lse)
    return found


def materialised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v with every score in memory, in q's dtype, and lse."""
    _, heads, _, head_dim = q.shape
    k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    s = (q @ k.mT) * (head_dim**-0.5 if scale is None else scale)
    visible = reference.visibility(reference.Pairs.of(q, k, q_offset), causal=causal).expand(s.shape)
    empty = ~visible.any(-1, keepdim=True)
    s = s.masked_fill(~visible, float("-inf")).masked_fill(empty, 0.0)
    p = s.softmax(-1).masked_fill(empty, 0.0)
    wide = s if s.dtype == torch.float64 else s.float()
    return p @ v, wide.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))


def rms(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return x.square().mean().sqrt() if dim is None else x.square().mean(dim).sqrt()


def floors(x: Inputs) -> dict[str, float]:
    """For each output 8 eps of the accumulator times the largest number that enters its sum."""
    eps = torch.finfo(torch.float64 if x.q.dtype == torch.float64 else torch.float32).eps
    scale = x.options.get("scale")
    scale = abs(x.q.shape[3] ** -0.5 if scale is None else scale)

    def most(t: torch.Tensor | None) -> float:
        return float(t.abs().max()) if t is not None and t.numel() else 0.0

    def longest(t: torch.Tensor | None) -> float:
        return float(t.double().norm(dim=-1).max()) if t is not None and t.numel() else 0.0

    ds = longest(x.do) * longest(x.v) + most(x.dlse)
    largest = {
        "o": most(x.v),
        "lse": 1.0 + scale * longest(x.q) * longest(x.k),
        "dq": scale * ds * most(x.k),
        "dk": scale * ds * most(x.q),
        "dv": most(x.do),
    }
    return {name: 8 * eps * value for name, value in largest.items()}


def complaints(got: Outputs, x: Inputs, saturated: bool = False) -> list[str]:
    """What is wrong with a result, one line for each rule that an output breaks; none when it is right.

    Where scores are so large that softmax saturates, standard attention's weights are 0 and 1 and its error is nothing.
    The exponent's own operands, s and lse, are then the largest numbers: `saturated` lets the floor grow with them.
    """
    want, plain, floor = oracle(x), standard(x), floors(x)
    if saturated:
        finite = want.lse[want.lse.isfinite()]
        largest_score = max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
        floor = {name: value * (1.0 if name == "lse" else largest_score) for name, value in floor.items()}
    lines: list[str] = []
    for name in Outputs._fields:
        if getattr(want, name) is not None and getattr(got, name) is not None:
            args = (getattr(t, name).detach() for t in (got, want, plain))
            dtype = torch.float32 if name == "lse" and x.q.dtype != torch.float64 else x.q.dtype
            lines += [f"{name}: {line}" for line in judge(*args, dtype, floor[name])]
    return lines


def judge(got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, floor: float) -> list[str]:
    """The rules that one output breaks, held to the rule of `dtype`."""
    if got.shape != want.shape or got.dtype != plain.dtype:
        return [f"is {got.dtype} {list(got.shape)}, not {plain.dtype} {list(want.shape)}"]
    got, plain = got.double(), plain.double()
    if not torch.equal(torch.where(want.isinf(), want, 0.0), torch.where(got.isinf() | want.isinf(), got, 0.0)):
        return ["has its infinities in the wrong places"]
    if not bool((got.isfinite() | want.isinf()).all()):
        return [f"has {int(got.isnan().sum())} NaN"]
    error, standard_error = ((t - want).masked_fill(want.isinf(), 0.0).abs() for t in (got, plain))
    if not want.numel():
        return []
    largest = float(want.masked_fill(want.isinf(), 0.0).abs().max())
    if dtype == torch.float64:
        limits = {"max": (float(error.max()), 1e-12 * (1 + largest))}
    else:
        half = dtype in (torch.float16, torch.bfloat16)
        ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if half and largest else 0.0
        factor = 1.0 if half else (2.0 if got.is_cuda else RMS[torch.float32])
        row, standard_row = rms(error, -1), rms(standard_error, -1)
        limit_row = 6 * factor * torch.maximum(standard_row, rms(standard_error)) + floor
        worst = int((row - limit_row).argmax())
        limits = {
            "rms": (float(rms(error)), factor * float(rms(standard_error)) + floor),
            "max": (float(error.max()), float(standard_error.max()) * (1 if half else 2) + ulp + floor),
            f"row {worst}": (float(row.flatten()[worst]), float(limit_row.flatten()[worst])),
        }
    return [f"{rule} {found:.3g}, at most {limit:.3g}" for rule, (found, limit) in limits.items() if not found <= limit]


def check(got: Outputs, x: Inputs, saturated: bool = False) -> None:
    """Raise with every broken rule, by the name of the output."""
    lines = complaints(got, x, saturated)
    assert not lines, "\n".join(lines)
