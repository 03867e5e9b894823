"""The gate before every timing: o and the gradients against the float64 oracle.

    max |x - oracle| <= 2 max |standard - oracle| + 8 eps(float32) max |operands|      x in o, dq, dk, dv, dbias, dsinks

`standard` is standard attention in the case's own dtype on the same numbers. The second term keeps the bound above zero
where standard attention happens to be exact. A long case is compared on its first and last key head, at full length.
So is every case of the speed suite with more heads than two; there o and dq of some queries are compared in every head,
and no head may hold a NaN or an infinity: memory is full of NaN before a GPU's calls are checked.

Dropout: ours is compared with the oracle under the weights that Philox keeps. Others draw as they like: of their o the
mean and the variance are compared with the oracle's own, and their gradients with nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, reach, visible
from bench.features import slopes
from bench.peers import OURS, standard_attention
from bench.philox import keep

NAMES = ("o", "dq", "dk", "dv")
FLOOR = 8 * torch.finfo(torch.float32).eps
SCORES_CHECKED_WHOLE = {"cpu": 2**24, "cuda": 2**31}  # above it, two key heads: the oracle costs time, not memory
SCORES_AT_ONCE = 2**25  # float64 numbers in one matrix of the oracle
STANDARD_AT_ONCE = 2**29  # numbers in one matrix of standard attention
NARROW, NARROW_ROWS = 4, 1024  # where rows see a fourth of the keys at most, pieces of so many are cut to what they see
SAMPLED = 8  # queries of every head
SAMPLE_SEED = 0
DROPOUT_SEED = 1
DRAWN_TOLERANCE = 3.0  # over the square root of the queries of a part: how far mean and variance may wander


@dataclass(frozen=True)
class Part:
    """One key head of one sequence, and the query heads that share it."""

    batch: int
    head_k: int


@dataclass(frozen=True)
class Piece:
    """Queries, and the keys among which are all that they see."""

    rows: range
    cols: range


@dataclass(frozen=True)
class Slice:
    """The oracle for one part."""

    part: Part
    expected: dict[str, Tensor]  # NAMES -> float64
    bounds: dict[str, float]
    variance: Tensor | None = None  # of o, where dropout draws


@dataclass(frozen=True)
class Sample:
    """The oracle for some queries of every head."""

    rows: Tensor  # int64, the queries
    expected: dict[str, Tensor]  # "o" and "dq" -> float64 [batch, heads, rows, ..]
    bounds: dict[str, float]


@dataclass(frozen=True)
class Expected:
    """What a case's results are held to, and a sentence saying how much of them.

    Args:
        slices: parts of what has heads.
        extent: the sentence.
        whole: gradients of operands that heads share: (float64, bound) by name.
        sample: queries of every head, where slices are not all heads and the speed suite asks for it.
    """

    slices: list[Slice]
    extent: str
    whole: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    sample: Sample | None = None


@dataclass(frozen=True)
class Verdict:
    """Largest errors by name, each with its bound; ok when none is above."""

    ok: bool
    errors: dict[str, float]
    bounds: dict[str, float]


def names(case: Case) -> tuple[str, ...]:
    """What a pass returns: o, and the gradients of what is differentiated."""
    feature = case.traits
    return (*NAMES, f"d{feature.operand}") if feature.learned else NAMES


def pick(case: Case, x: Tensor, part: Part) -> Tensor:
    """The heads of x [batch, heads or heads_k, ...] that belong to one key head -> [1, group or 1, ...]."""
    width = x.shape[1] // case.heads_k
    return x[part.batch : part.batch + 1, part.head_k * width : (part.head_k + 1) * width]


def pick_operand(case: Case, x: Tensor, part: Part) -> Tensor:
    """The same of a feature's operand, [heads] or with axes of size 1 for what shares it: a view."""
    heads = slice(part.head_k * case.group, (part.head_k + 1) * case.group)
    if x.dim() == 1:
        return x[heads]
    x = x if x.shape[0] == 1 else x[part.batch : part.batch + 1]
    return x if x.shape[1] == 1 else x[:, heads]


def cut(x: Tensor, piece: Piece) -> Tensor:
    """A mask or bias [.., seqlen_q or 1, seqlen_k or 1] where it meets a piece; sinks whole."""
    if x.dim() == 1:
        return x
    x = x if x.shape[-2] == 1 else x[..., piece.rows.start : piece.rows.stop, :]
    return x if x.shape[-1] == 1 else x[..., piece.cols.start : piece.cols.stop]


def pieces(case: Case, at_once: int) -> Iterator[Piece]:
    """The queries of a case, so many at a time that one key head has at_once scores in a piece."""
    found = reach(case)
    narrow = found is not None and NARROW * int((found[1] - found[0]).max()) <= case.seqlen_k
    rows = NARROW_ROWS if narrow else max(at_once // (case.seqlen_k * case.group), 1)
    for start in range(0, case.seqlen_q, rows):
        stop = min(start + rows, case.seqlen_q)
        cols = range(case.seqlen_k)
        if narrow and found is not None:
            cols = range(int(found[0][start:stop].min()), int(found[1][start:stop].max()))
        yield Piece(range(start, stop), cols)


def hidden(case: Case, piece: Piece, device: torch.device) -> Tensor | None:
    """bool [rows, cols] of a piece, True where a key is hidden; None where the piece hides nothing."""
    if not case.feature and not case.causal:
        return None
    seen = visible(case, piece.rows, piece.cols, device)
    return None if seen.all() else ~seen


def kept(case: Case, part: Part, piece: Piece, device: torch.device) -> Tensor | None:
    """What dropout multiplies the weights of a piece by: [1, group, rows, cols], float64; None without dropout."""
    if not case.traits.dropout_p:
        return None
    torch.manual_seed(DROPOUT_SEED)
    seed = int(torch.randint(0, 2**63 - 1, (1,), device=device))  # as a call draws it
    first = part.head_k * case.group
    h = torch.arange(first, first + case.group, device=device)[:, None, None]
    i = torch.arange(piece.rows.start, piece.rows.stop, device=device)[:, None]
    j = torch.arange(piece.cols.start, piece.cols.stop, device=device)
    stays = keep(seed, case.traits.dropout_p, torch.full_like(j, part.batch), h, i, j)
    return stays[None].double() / (1 - case.traits.dropout_p)


def said(case: Case, part: Part, piece: Piece, operand: tuple[Tensor, ...], device: torch.device) -> dict[str, Any]:
    """The case in the oracle's keywords, for one piece: only what is there, so that a plain case is a plain call.

    Every mask but causal is given as a bool for each pair, whatever it is called elsewhere.
    """
    feature = case.traits
    told: dict[str, Any] = {
        "causal": case.causal,
        "q_offset": piece.rows.start + case.seqlen_k - case.seqlen_q - piece.cols.start,
    }
    if case.feature and (mask := hidden(case, piece, device)) is not None:
        told["mask"] = ~mask[None, None]
    if operand:
        told[feature.operand] = cut(operand[0], piece)
    if feature.slopes:
        told["alibi_slopes"] = pick_operand(case, slopes(case.heads).to(device), part).double()
    if feature.softcap is not None:
        told["softcap"] = feature.softcap
    return told


def take(x: Tensor, piece: range) -> Tensor:
    """The positions of a piece: x[:, :, piece]."""
    return x[:, :, piece.start : piece.stop]


def gradients(x: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What backward left in leaves that require grad, zeros where nothing."""
    return tuple(y.grad if y.grad is not None else torch.zeros_like(y) for y in leaves if y.requires_grad)


def oracle(case: Case, part: Part, tensors: tuple[Tensor, ...], backward: bool = True) -> dict[str, Tensor]:
    """flash.reference.attention and its gradients in float64 for one part, some rows of queries at a time."""
    from flash.reference import attention

    q, k, v, *operand, do = (x.detach() for x in tensors)
    q, k, v, do = (pick(case, x, part).double() for x in (q, k, v, do))
    own = tuple(pick_operand(case, x, part).double() for x in operand)
    leaves = (q, k, v, *(own if case.traits.learned else ()))
    for leaf in leaves:
        leaf.requires_grad_(backward)
    outputs = []
    for piece in pieces(case, SCORES_AT_ONCE):
        told = said(case, part, piece, own, q.device)
        factor = kept(case, part, piece, q.device)
        if factor is not None:
            told["dropout_mask"] = factor
        o = attention(take(q, piece.rows), take(k, piece.cols), take(v, piece.cols), **told)
        if backward:
            o.backward(take(do, piece.rows))
        outputs.append(o.detach())
    return dict(zip(names(case), (torch.cat(outputs, 2), *gradients(q, leaves)), strict=False))


def undropped(case: Case, part: Part, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance of o over dropout's draws, with p the weights before it and r its rate.

        mean_i = sum_j p_ij v_j        variance_i = r / (1 - r) sum_j p_ij^2 v_j^2

    p^2 is the softmax of twice the scores, times exp(lse of those - 2 lse).
    """
    from flash.reference import attention

    q, k, v = (pick(case, x.detach(), part).double() for x in tensors[:3])
    scale, rate = case.head_dim**-0.5, case.traits.dropout_p
    means, variances = [], []
    for piece in pieces(case, SCORES_AT_ONCE):
        told = said(case, part, piece, (), q.device)
        rows, keys, values = take(q, piece.rows), take(k, piece.cols), take(v, piece.cols)
        mean, lse = attention(rows, keys, values, scale=scale, return_lse=True, **told)
        squares, twice = attention(rows, keys, values**2, scale=2 * scale, return_lse=True, **told)
        means.append(mean)
        variances.append(rate / (1 - rate) * squares * (twice - 2 * lse).exp()[..., None])
    return torch.cat(means, 2), torch.cat(variances, 2)


def standard(case: Case, part: Part, tensors: tuple[Tensor, ...], backward: bool = True) -> dict[str, Tensor]:
    """Standard attention and its gradients for one part, computed in the case's dtype; pieces are added in float64."""
    q, k, v, *operand, do = (x.detach() for x in tensors)
    q, k, v, do = (pick(case, x, part) for x in (q, k, v, do))
    own = tuple(pick_operand(case, x, part) for x in operand)
    leaves = (q, k, v, *(own if case.traits.learned else ()))
    totals = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    outputs = []
    for piece in pieces(case, STANDARD_AT_ONCE):
        told = said(case, part, piece, own, q.device)
        terms: dict[str, Any] = {name: told.get(name) for name in ("bias", "softcap", "sinks")}
        if "alibi_slopes" in told:
            i, j = (torch.arange(x.start, x.stop, device=q.device) for x in (piece.rows, piece.cols))
            apart = (i[:, None] + (case.seqlen_k - case.seqlen_q) - j).abs()
            terms["bias"] = (-told["alibi_slopes"][:, None, None] * apart).to(q.dtype)[None]
        if (factor := kept(case, part, piece, q.device)) is not None:
            terms["drop"] = factor.to(q.dtype).mul
        operands = take(q, piece.rows), take(k, piece.cols), take(v, piece.cols)
        o = standard_attention(*operands, hidden(case, piece, q.device), **terms)
        if backward:
            for total, grad in zip(totals, torch.autograd.grad(o, leaves, take(do, piece.rows)), strict=True):
                total += grad
        outputs.append(o.detach())
    return dict(zip(names(case), (torch.cat(outputs, 2), *(totals if backward else ())), strict=False))


def sampled(case: Case, tensors: tuple[Tensor, ...], backward: bool = True) -> Sample:
    """The oracle and standard attention for a few queries of every head at once: each meets all of its keys."""
    from flash.reference import attention

    q, k, v, do = (x.detach() for x in tensors)
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    drawn = torch.randperm(case.seqlen_q, generator=generator)[:SAMPLED]
    drawn[:1], drawn[-1:] = 0, case.seqlen_q - 1
    rows = drawn.unique()
    found = reach(case)
    assert found is not None
    begin, end = (x[rows][:, None] for x in found)
    j = torch.arange(case.seqlen_k)
    seen, rows = ((j >= begin) & (j < end)).to(q.device), rows.to(q.device)
    results = []
    for exact in (True, False):
        wide = torch.float64 if exact else q.dtype
        some, keys, values, grad = q[:, :, rows].to(wide), k.to(wide), v.to(wide), do[:, :, rows].to(wide)
        some.requires_grad_(backward)
        o = attention(some, keys, values, mask=seen) if exact else standard_attention(some, keys, values, ~seen)
        results.append({"o": o.detach()} | ({"dq": torch.autograd.grad(o, some, grad)[0]} if backward else {}))
    expected, own = results
    floor = FLOOR * max(float(x.abs().max()) for x in (q, k, v, do))
    bounds = {name: 2 * float((own[name].double() - x).abs().max()) + floor for name, x in expected.items()}
    return Sample(rows, expected, bounds)


def expect(case: Case, *tensors: Tensor, backward: bool = True, few: bool = False) -> Expected:
    """Runs the oracle and standard attention once; every peer is compared with the result.

    Args:
        case: what the tensors are of.
        tensors: as bench.cases.inputs makes them.
        backward: whether gradients are compared as well.
        few: whether two key heads and a few queries of every head are enough, however short the case.
    """
    device = tensors[0].device
    scores = case.batch * case.heads * case.seqlen_q * case.seqlen_k
    parts = [Part(b, h) for b in range(case.batch) for h in range(case.heads_k)]
    extent = "every head"
    shared = (
        names(case)[len(NAMES) :] if backward else ()
    )  # the gradients of what heads share are sums over all of them
    sample = None
    if (few or scores > SCORES_CHECKED_WHOLE[device.type]) and len(parts) > 2 and not shared:
        parts = [parts[0], parts[-1]]
        extent = "the first key head of the first sequence and the last of the last, at full length"
        if few and not case.feature:
            sample = sampled(case, tensors, backward)
            extent += f"; o and dq of {len(sample.rows)} queries of every head; nothing anywhere NaN or infinite"
    drawn = bool(case.traits.dropout_p)
    slices = []
    sums = {name: [torch.zeros_like(tensors[3], dtype=torch.float64) for _ in range(2)] for name in shared}
    for part in parts:
        expected, own = (compute(case, part, tensors, backward) for compute in (oracle, standard))
        for name in shared:
            for total, grad in zip(sums[name], (expected.pop(name), own.pop(name)), strict=True):
                view = pick_operand(case, total, part)
                view += grad
        floor = FLOOR * max(float(pick(case, x.detach(), part).abs().max()) for x in (*tensors[:3], tensors[-1]))
        bounds = {name: 2 * float((own[name].double() - x).abs().max()) + floor for name, x in expected.items()}
        slices.append(Slice(part, expected, bounds))
        if drawn:
            mean, variance = undropped(case, part, tensors)
            slices[-1] = Slice(part, expected | {"mean of o": mean}, bounds, variance)
    if drawn:
        extent += ", under the weights that Philox keeps; other peers' o by mean and variance, their gradients not"
    whole = {}
    for name, (expected_sum, own_sum) in sums.items():
        floor = FLOOR * max(float(x.detach().abs().max()) for x in (*tensors, expected_sum))
        whole[name] = (expected_sum, 2 * float((own_sum - expected_sum).abs().max()) + floor)
    return Expected(slices, extent, whole, sample)


def compare(case: Case, expected: Expected, results: dict[str, Tensor], peer: str = OURS) -> Verdict:
    """Compares results (all of `names`, or o alone) with the oracle; a NaN is an error above every bound."""
    if case.traits.dropout_p and peer != OURS:
        return compare_draws(case, expected, results["o"])
    found = []
    for name, x in results.items():
        if name in expected.whole:
            found.append((name, x.detach(), *expected.whole[name]))
            continue
        for part in expected.slices:
            found.append((name, pick(case, x.detach(), part.part), part.expected[name], part.bounds[name]))
        if expected.sample is None:
            continue
        if name in expected.sample.expected:
            some = x.detach()[:, :, expected.sample.rows]
            found.append((name, some, expected.sample.expected[name], expected.sample.bounds[name]))
        if not bool(x.isfinite().all()):
            nothing = torch.zeros((), dtype=torch.float64)
            found.append((name, nothing / 0, nothing, 0.0))
    return judge(found)


def poison(tensors: tuple[Tensor, ...]) -> None:
    """Leave NaN in the memory that a GPU's allocator gives out next, so that what a kernel does not write shows."""
    if tensors[0].device.type == "cuda":
        held = [torch.full_like(x, float("nan")) for x in tensors for _ in range(2)]
        del held


def compare_draws(case: Case, expected: Expected, o: Tensor) -> Verdict:
    """Compares o after dropout by another generator with the mean and the variance that it must have."""
    found = []
    for part in expected.slices:
        assert part.variance is not None
        off = (pick(case, o.detach(), part.part).double() - part.expected["mean of o"]) / part.variance.sqrt()
        bound = DRAWN_TOLERANCE / math.sqrt(off.shape[1] * off.shape[2])
        one, none = off.new_ones(()), off.new_zeros(())
        found.append(("variance of o", (off**2).mean(), one, bound))
        found.append(("mean of o", off.mean(), none, bound))
    return judge(found)


def judge(found: list[tuple[str, Tensor, Tensor, float]]) -> Verdict:
    """The largest error of each name, of (name, result, expected, bound)."""
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    ok = True
    for name, x, wanted, bound in found:
        if x.shape != wanted.shape:
            raise ValueError(f"{name} must have shape {tuple(wanted.shape)}, got {tuple(x.shape)}")
        error = float((x.double() - wanted).abs().max())
        ok = ok and error <= bound
        if error > errors.get(name, -1.0) or math.isnan(error):
            errors[name], bounds[name] = error, bound
    return Verdict(ok, errors, bounds)
