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
Tangents of o and lse (to, tlse) are held as o and lse are, against standard attention's in forward mode.

The gradient of a bias, slope or sink may be a handful of long sums, and one of them can be exact by luck. Its e_0 is at
least what chance makes of its terms' errors (`likely`). An operand of another dtype than q's is held to the coarser.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flash import reference

RMS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.25}
OPERANDS = ("bias", "alibi_slopes", "sinks")  # those beside q, k and v that have a gradient
ASIDE = ("max_seqlen_q", "max_seqlen_k", "backend", "config", "deterministic")  # keywords that change no result


class Outputs(NamedTuple):
    """What a call returns, and what its backward pass and forward mode find; None where it was not asked for."""

    o: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dbias: torch.Tensor | None = None
    dalibi_slopes: torch.Tensor | None = None
    dsinks: torch.Tensor | None = None
    to: torch.Tensor | None = None
    tlse: torch.Tensor | None = None  # 0 where lse is -inf


class Inputs(NamedTuple):
    """A call: tensors, the gradients that come back, and the keywords of `flash_attention`, or those of
    `flash_attention_varlen` with q [total_q, heads, head_dim]; a `dropout_mask` stands in for dropout_p. With
    tangents of q, k, v or OPERANDS, by name, it is run in forward mode as well."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    options: dict[str, Any] = {}  # never written to
    tangents: dict[str, torch.Tensor] | None = None


def differentiate(attention: Any, x: Inputs, operands: tuple[str, ...] = OPERANDS) -> Outputs:
    """Run (q, k, v, **options) -> (o, lse) and, where x brings do, its backward pass, also for these of its options;
    and in forward mode, where it brings tangents."""
    if x.tangents is not None:
        moved = tangents_of(attention, x)
        return differentiate(attention, x._replace(tangents=None), operands)._replace(to=moved.to, tlse=moved.tlse)
    names = [name for name in operands if x.options.get(name) is not None] if x.do is not None else []
    leaves = [t.detach().requires_grad_(x.do is not None) for t in (x.q, x.k, x.v, *(x.options[n] for n in names))]
    o, lse = attention(*leaves[:3], **{**x.options, **dict(zip(names, leaves[3:], strict=True))})
    if x.do is None:
        return Outputs(o, lse)
    outputs, gradients = [o], [x.do.to(o.dtype)]
    if x.dlse is not None:
        outputs, gradients = [o, lse], [x.do.to(o.dtype), x.dlse.to(lse.dtype)]
    found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    others = {f"d{name}": g for name, g in zip(names, grads[3:], strict=True)}
    return Outputs(o.detach(), lse.detach(), *grads[:3], **others)


def tangents_of(attention: Any, x: Inputs) -> Outputs:
    """Run (q, k, v, **options) -> (o, lse) in forward mode, along x's tangents."""
    assert x.tangents is not None
    given = {"q": x.q, "k": x.k, "v": x.v, **x.options}

    def function(*moved: torch.Tensor) -> Any:
        now = {**given, **dict(zip(x.tangents or {}, moved, strict=True))}
        q, k, v = (now.pop(name) for name in "qkv")
        o, lse = attention(q, k, v, **now)
        return (o, lse.masked_fill(lse == float("-inf"), 0.0)), lse

    at = tuple(given[name].detach() for name in x.tangents)
    (o, _), (to, tlse), lse = torch.func.jvp(function, at, tuple(x.tangents.values()), has_aux=True)
    return Outputs(o, lse, to=to, tlse=tlse)


def dense_or_packed(attend: Callable[..., Any]) -> Callable[..., Any]:
    """A dense (q, k, v, **options) -> (o, lse), taught packed sequences and keywords that change no result."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        options = {name: value for name, value in options.items() if name not in ASIDE}
        if "cu_seqlens_q" not in options:
            return attend(q, k, v, **options)
        return reference.one_by_one(attend, q, k, v, options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k"), options)

    return attention


def widened(x: Inputs) -> Inputs:
    """x in float64; what hides a key in a bias, its own dtype's lowest number, becomes -inf."""
    options = dict(x.options)
    for name in OPERANDS:
        if (t := options.get(name)) is not None:
            lowest = t <= torch.finfo(t.dtype).min if name == "bias" else torch.zeros_like(t, dtype=torch.bool)
            options[name] = t.detach().double().masked_fill(lowest, float("-inf"))
    tangents = None if x.tangents is None else {name: t.double() for name, t in x.tangents.items()}
    return Inputs(*(None if t is None else t.double() for t in x[:5]), options=options, tangents=tangents)


def oracle(x: Inputs) -> Outputs:
    """The result in float64."""

    def attention(*args: Any, **options: Any) -> Any:
        return reference.attention(*args, return_lse=True, **options)

    return differentiate(dense_or_packed(attention), widened(x))


def standard(x: Inputs) -> Outputs:
    """Standard attention in the inputs' dtype; lse from float32 scores, as lse itself is float32."""
    found = differentiate(dense_or_packed(materialised), x)
    if x.q.dtype in (torch.float16, torch.bfloat16):
        tangents = None if x.tangents is None else {name: t.float() for name, t in x.tangents.items()}
        wide = Inputs(x.q.float(), x.k.float(), x.v.float(), options=x.options, tangents=tangents)
        wide_found = differentiate(dense_or_packed(materialised), wide)
        found = found._replace(lse=wide_found.lse.detach(), tlse=wide_found.tlse)
    return found


def like(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """An operand in the dtype of the scores that it meets."""
    return x.to(s.dtype)


def materialised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    score_mod: Any = None,
    dropout_mask: torch.Tensor | None = None,
    spread: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = like,
    **hiding: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v with every score in memory, in q's dtype, and lse. An operand meets s by `spread`."""
    _, heads, _, head_dim = q.shape
    k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    at = reference.Pairs.of(q, k, q_offset)
    visible = reference.visibility(at, bias=bias, **hiding)
    s = reference.contract_head_dim(q, k, visible) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    if bias is not None:
        s = s + spread(bias, s)
    if alibi_slopes is not None:
        s = s - spread(alibi_slopes[..., None, None], s) * (at.position - at.j).abs()
    if score_mod is not None:
        s = score_mod.torch_fn(s.where(visible, 0.0), at.b, at.h, at.i, at.j, score_mod.args).to(q.dtype)
    s = s.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        none = s.new_zeros(*s.shape[:3], 1)
        s = torch.cat((s, none + spread(sinks[:, None, None], none)), -1)
    empty = (s == float("-inf")).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    p = s.softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[2]]
    if dropout_mask is not None:
        p = p * dropout_mask.to(p.dtype)
    wide = s if s.dtype == torch.float64 else s.float()
    lse = wide.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return reference.contract_keys(p, v, visible), lse


class Terms(torch.autograd.Function):
    """An operand spread over the scores; its gradient is not the sum of its terms, but of the squares of their errors.

    The errors of one row of scores go together, as they share lse and delta: they are summed before they are squared.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, s: torch.Tensor, exact: dict[int, torch.Tensor], key: int) -> torch.Tensor:
        ctx.shape, ctx.exact, ctx.key = x.shape, exact, key
        return x.to(s.dtype).expand(s.shape)

    @staticmethod
    def backward(ctx: Any, terms: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        error = terms.double() - ctx.exact.setdefault(ctx.key, terms.double())
        if ctx.shape[-1:] == (1,):
            error = error.sum(-1, keepdim=True)
        return error.square().sum_to_size(ctx.shape), None, None, None


def likely(x: Inputs) -> dict[str, torch.Tensor]:
    """For each gradient of OPERANDS, how wrong the errors of its terms are likely to make each of its sums.

    Errors of different rows are independent, so that their squares add. The rms of n such numbers strays by one in
    sqrt(2 n); three times that is allowed.
    """
    exact: dict[int, torch.Tensor] = {}
    found = Outputs(x.q, x.q)
    for q, k, v, do, dlse in (widened(x)[:5], x[:5]):
        keys = itertools.count()

        def spread(operand: torch.Tensor, s: torch.Tensor, keys: Any = keys) -> torch.Tensor:
            return Terms.apply(operand, s, exact, next(keys))

        options = {**widened(x).options, "spread": spread}
        found = differentiate(dense_or_packed(materialised), Inputs(q, k, v, do, dlse, options))
    squares = {name: t for name, t in found._asdict().items() if name[1:] in OPERANDS and t is not None}
    return {name: t.sqrt() * (1 + 3 / math.sqrt(2 * t.numel())) for name, t in squares.items() if t.numel()}


def rms(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return x.square().mean().sqrt() if dim is None else x.square().mean(dim).sqrt()


def farthest(x: Inputs) -> float:
    """The largest distance between a query's position and a key."""
    lengths = [x.q.shape[-2], x.k.shape[-2]]
    if "cu_seqlens_q" in x.options:
        lengths = [int(x.options[name].diff().max()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    seqlen_q, seqlen_k = lengths
    q_offset = x.options.get("q_offset")
    offset = torch.as_tensor(seqlen_k - seqlen_q if q_offset is None else q_offset).double()
    return float(torch.maximum((offset + seqlen_q).abs(), (offset - seqlen_k).abs()).max())


def floors(x: Inputs) -> dict[str, float]:
    """For each output 8 eps of the accumulator times the largest number that enters its sum."""
    eps = torch.finfo(torch.float64 if x.q.dtype == torch.float64 else torch.float32).eps
    scale = x.options.get("scale")
    scale = abs(x.q.shape[-1] ** -0.5 if scale is None else scale)

    def most(t: torch.Tensor | None) -> float:
        t = t.double().where(t > torch.finfo(t.dtype).min, 0.0) if t is not None else None  # the lowest hides
        return float(t.abs().max()) if t is not None and t.numel() else 0.0

    def longest(t: torch.Tensor | None) -> float:
        return float(t.double().norm(dim=-1).max()) if t is not None and t.numel() else 0.0

    bias, slopes, sinks = (x.options.get(name) for name in OPERANDS)
    dropout, distance = x.options.get("dropout_mask"), farthest(x) if slopes is not None else 0.0
    kept = 1.0 if dropout is None else float(dropout.max()) if dropout.numel() else 0.0
    product = scale * longest(x.q) * longest(x.k)
    product = min(product, x.options.get("softcap") or product)
    ds = kept * longest(x.do) * longest(x.v) + most(x.dlse)
    t = {**dict.fromkeys(("q", "k", "v", *OPERANDS)), **(x.tangents or {})}
    ts = scale * (longest(t["q"]) * longest(x.k) + longest(x.q) * longest(t["k"]))
    ts += most(t["bias"]) + most(t["alibi_slopes"]) * distance
    largest = {
        "o": kept * most(x.v),
        "lse": 1.0 + product + most(bias) + most(slopes) * distance + most(sinks),
        "dq": scale * ds * most(x.k),
        "dk": scale * ds * most(x.q),
        "dv": kept * most(x.do),
        "dbias": ds,
        "dalibi_slopes": ds * distance,
        "dsinks": ds,
        "to": kept * (2 * ts * most(x.v) + most(t["v"])) + most(t["sinks"]) * most(x.v),
        "tlse": ts + most(t["sinks"]),
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
    chance = likely(x) if any(getattr(got, f"d{name}") is not None for name in OPERANDS) else {}
    lines: list[str] = []
    for name in Outputs._fields:
        if getattr(want, name) is not None and getattr(got, name) is not None:
            args = (getattr(t, name).detach() for t in (got, want, plain))
            lines += [f"{name}: {line}" for line in judge(*args, rule_of(name, x), floor[name], chance.get(name))]
    return lines


def rule_of(name: str, x: Inputs) -> torch.dtype:
    """The dtype to whose rule an output is held: the coarser one of q and the operand whose gradient it is."""
    if name in ("lse", "tlse"):
        return torch.float64 if x.q.dtype == torch.float64 else torch.float32
    own = x.options[name[1:]].dtype if name[1:] in OPERANDS else x.q.dtype
    return max(x.q.dtype, own, key=lambda dtype: torch.finfo(dtype).eps)


def judge(
    got: torch.Tensor,
    want: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype,
    floor: float,
    chance: torch.Tensor | None = None,
) -> list[str]:
    """The rules that one output breaks, held to the rule of `dtype`; chance: errors that `plain` escaped by luck."""
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
    if chance is not None:
        standard_error = torch.maximum(standard_error, chance)
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
