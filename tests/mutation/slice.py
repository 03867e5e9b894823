"""The calls of tests/mutation/cases.py, run so that each compares everything a mutant could change.

A case is run forward and backward, or in forward mode, through the public function. What comes back must be within the
bounds of the oracle (tests/bounds.py), in float32 also about as near to it as the unchanged kernels came; it must have
NaN where the oracle has it, and have cost as many products and loaded and stored elements as before.
"""

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from flash.kernels import bias
from tests import bounds, calls, features, parts
from tests.bounds import Inputs, Outputs
from tests.interpreter import memory
from tests.interpreter.poison import poison
from tests.mutation.cases import Case
from tests.mutation.operands import make_own


class Prepared(NamedTuple):
    """A case with its inputs, what they must give, and what it must cost."""

    case: Case
    inputs: Inputs
    want: Outputs
    plain: Outputs
    floors: dict[str, float]
    chance: dict[str, torch.Tensor]
    work: list[Any]
    errors: dict[str, float] = {}


def place(x: torch.Tensor) -> torch.Tensor:
    return x


def inputs_of(case: Case) -> Inputs:
    """Inputs of a case, the same in every process."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    names = case.names.split()
    x = features.call_of(place, names, case.sizes, case.dtype, case.sigma)
    own = [name for name in names if name not in features.NAMES]
    for name in own:
        x = x._replace(options={**x.options, **make_own(name, case.sizes, case.dtype)})
    x = x._replace(options={**x.options, **case.options}, dlse=x.dlse if case.dlse else None)
    named = features.differentiable(x)
    moved = [name for name in named if case.tangents == "all" or name in case.tangents.split()]
    x = x._replace(tangents={name: torch.randn_like(named[name]) for name in moved} or None)
    rows = 0 if "packed" in names else 2  # the axis of queries and keys
    if case.planted == "hidden":
        weight = bounds.oracle(features.known(x._replace(do=torch.ones_like(x.do), dlse=None, tangents=None))).dv
        unseen = (weight == 0).all(-1)
        if not unseen.any():
            raise ValueError(f"{case.name}: every key is seen")
        for t in (x.k, x.v, *((x.tangents or {}).get(name) for name in "kv")):
            if t is not None:
                t[unseen] = math.nan
    elif case.planted == "whole":
        x = x._replace(q=x.q.round(), k=x.k.round())
    elif case.planted == "seen":
        for t, part in ((x.q, 0.33), (x.k, 0.5), (x.v, 0.2), (x.v, 0.83), (x.do, 0.25)):
            t.select(rows, int(t.shape[rows] * part))[..., -1] = math.nan
        for name, part in (("q", 0.1), ("k", 0.9), ("v", 0.7)) if x.tangents else ():
            t = x.tangents[name]
            t.select(rows, int(t.shape[rows] * part))[..., 0 if name == "v" else -1 :] = math.nan
    return x


def prepare(case: Case) -> Prepared:
    """Run a case unchanged, and keep what mutants are compared with; raises where it is wrong."""
    x = inputs_of(case)
    known = features.known(x)
    want = bounds.oracle(known)
    sound = known._replace(**{name: getattr(known, name).nan_to_num(0.0) for name in ("q", "k", "v", "do")})
    if known.tangents is not None:
        sound = sound._replace(tangents={name: t.nan_to_num(0.0) for name, t in known.tangents.items()})
    plain, floors = bounds.standard(sound), bounds.floors(sound)
    chance = {} if case.dtype == torch.float64 or case.needs == () else bounds.likely(sound)
    if case.planted == "whole":  # the largest numbers of the exponent are s and lse
        floors = {name: value * (1.0 if name == "lse" else float(want.lse.max())) for name, value in floors.items()}
    if case.far:  # bit by bit what the same numbers give side by side
        want = plain = run(Prepared(case._replace(far=""), x, want, plain, floors, chance, []))
        floors, chance = dict.fromkeys(floors, 0.0), {}
    prepared = Prepared(case, x, want, plain, floors, chance, [])
    warm(case.dtype)
    memory.launches.clear()
    got = run(prepared)
    complaint = wrong(prepared, got)
    if complaint:
        raise AssertionError(f"{case.name}: {complaint}")
    return prepared._replace(work=[*memory.launches], errors=errors_of(prepared, got))


@cache
def warm(dtype: torch.dtype) -> None:
    """Let the first call of a dtype ask its backend whether it works, which costs a launch."""
    x = torch.ones(1, 1, 1, 16, dtype=dtype)
    features.attention("triton")(x, x, x)


def far_apart(x: Inputs, axis: str) -> Inputs:
    """x with every tensor of four axes spread along one of them: "dim" is q's last axis, "column" that of operands."""
    tensors = {name: getattr(x, name) for name in ("q", "k", "v", "do") if axis != "column"}
    operands = {name: t for name, t in x.options.items() if isinstance(t, torch.Tensor) and t.dim() == 4}
    spread = {name: across(t, axis) for name, t in {**tensors, **operands}.items()}
    options = {name: spread.get(name, value) for name, value in x.options.items()}
    if x.dlse is not None and axis not in ("dim", "column"):
        tensors["dlse"] = spread["dlse"] = across(x.dlse.unsqueeze(3), axis).squeeze(3)
    return x._replace(**{name: spread[name] for name in tensors}, options=options)


def across(x: torch.Tensor, axis: str) -> torch.Tensor:
    """A tensor spread along an axis; the last one has two names."""
    if axis in ("dim", "column"):
        return calls.far_apart(x.mT, "row", x.device).mT
    return calls.far_apart(x, axis, x.device)


def run(prepared: Prepared) -> Outputs:
    """Outputs, and gradients or tangents, of a case by the kernels as they now are."""
    case, x, *_ = prepared
    if x.tangents is not None:
        return bounds.tangents_of(features.attention("triton", case.config), x)
    if case.far:  # made anew each time: a process with so much memory to its name cannot fork
        x = far_apart(x, case.far)
    if case.cut:
        return in_parts(case, x)
    named = features.differentiable(x)
    wanted = [name for name in named if case.needs is None or name in case.needs]
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in named.items()}
    options = {**x.options, **{name: t for name, t in leaves.items() if name not in "qkv"}}
    with patched(case.patches):
        o, lse = features.attention("triton", case.config)(leaves["q"], leaves["k"], leaves["v"], **options)
        outputs, gradients = ((o,), (x.do,)) if x.dlse is None else ((o, lse), (x.do, x.dlse))
        found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], gradients)
    return Outputs(o.detach(), lse.detach(), **{f"d{name}": t for name, t in zip(wanted, found, strict=True)})


def in_parts(case: Case, x: Inputs) -> Outputs:
    """The same of a case that is cut: also by heads and batch elements, where there are some."""
    whole = parts.whole_of(x, "triton", case.config)
    sizes = len(whole.q), whole.k.shape[1], whole.q.shape[2], whole.k.shape[2]
    batch, heads, rows, cols = ([(0, n // 2), (n // 2, n - n // 2)] if n > 1 else [(0, n)] for n in sizes)
    return parts.together(whole, x, parts.Pieces(rows, cols, heads, batch), x.do, x.dlse)


@contextmanager
def patched(numbers: Mapping[str, int]) -> Iterator[None]:
    """Other numbers in kernels/bias.py for a while."""
    stock = {name: getattr(bias, name) for name in numbers}
    vars(bias).update(numbers)
    try:
        yield
    finally:
        vars(bias).update(stock)


def check(prepared: Prepared) -> str:
    """What is wrong with a case by the kernels as they now are; empty where nothing is."""
    memory.launches.clear()
    complaint = wrong(prepared, run(prepared))
    if complaint:
        return complaint
    return "" if memory.launches == prepared.work else f"costs {memory.launches}, not {prepared.work}"


def errors_of(prepared: Prepared, got: Outputs) -> dict[str, float]:
    """The mean error of each output of a float32 case."""
    if prepared.case.dtype != torch.float32:
        return {}
    pairs = {name: (getattr(got, name), getattr(prepared.want, name)) for name in Outputs._fields}
    errors = {name: (x - y).nan_to_num(0.0) for name, (x, y) in pairs.items() if x is not None}
    return {name: float(bounds.rms(error)) for name, error in errors.items()}


def wrong(prepared: Prepared, got: Outputs) -> str:
    """The first output that is not what the oracle says."""
    for name in Outputs._fields:
        tensors = [getattr(t, name) for t in (got, prepared.want, prepared.plain)]
        if tensors[0] is None:
            continue
        lost = [t.isnan() for t in tensors]
        if not torch.equal(lost[0], lost[1]):
            return f"{name} has NaN in other places"
        tensors = [t.detach().masked_fill(lost[1] | lost[2], 0.0) for t in tensors]
        dtype = bounds.rule_of(name, prepared.inputs)
        for line in bounds.judge(*tensors, dtype, prepared.floors[name], prepared.chance.get(name)):
            return f"{name} {line}"
    for name, error in errors_of(prepared, got).items():
        if error > 1.5 * prepared.errors.get(name, error):
            return f"{name} is {error / prepared.errors[name]:.1f} times as wrong as it was"
    return ""


def watch_allocations() -> None:
    """Fill what the library allocates with the mark that the memory checker knows; for the whole process."""

    def watched(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = stock(*args, **kwargs)
            module = sys._getframe(1).f_globals.get("__name__", "")
            return poison(x) if module.startswith("flash.") and x.device.type == "cpu" else x

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, watched(getattr(torch, name)))
    torch.Tensor.new_empty = watched(torch.Tensor.new_empty)  # type: ignore[method-assign, assignment]
