"""The calls that mutants are shown: small ones, and each compares everything a mutant could change.

A case is data: the features of a call (tests/features.py), its sizes and dtype. It is run forward and backward through
the public function, and what comes back must be within the bounds of the oracle (tests/bounds.py), have NaN where the
oracle has it, and have cost as many products and loaded and stored elements as the kernels did unchanged.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flash.kernels.spec import Config
from tests import bounds, calls, features
from tests.bounds import Inputs, Outputs
from tests.features import Sizes
from tests.interpreter import memory
from tests.interpreter.poison import poison

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ONE = Sizes(batch=1, heads=1, heads_k=1, seqlen_q=37, seqlen_k=51, head_dim=20, head_dim_v=12)
TWO = ONE._replace(batch=2, heads=4, heads_k=2, seqlen_q=7, seqlen_k=19)


class Case(NamedTuple):
    """One call.

    Args:
        names: features of tests/features.py, with a space between them.
        sizes: of the call.
        dtype: of q, k and v.
        options: further keywords.
        needs: operands whose gradient is asked for; None is every one.
        dlse: whether lse has a gradient.
        planted: "hidden" puts NaN into every key and value that no query sees, "seen" some into each of q, k, v and do.
        far: axis along which q, k, v and do lie far apart (`calls.far_apart`).
        sigma: standard deviation of q, k and v.
        config: tile sizes.
    """

    names: str = ""
    sizes: Sizes = ONE
    dtype: torch.dtype = FLOAT64
    options: Mapping[str, Any] = {}
    needs: tuple[str, ...] | None = None
    dlse: bool = True
    planted: str = ""
    far: str = ""
    sigma: float = 1.0
    config: Any = features.TILES

    @property
    def name(self) -> str:
        """What sets the case apart."""
        told = []
        for field, value, default in zip(self._fields, self, Case(), strict=True):
            if field == "config":
                value = default if value == default else "/".join(f"{c.block_m}x{c.block_n}" for c in value.values())
            if field == "sizes":
                told += [f"{k}={v}" for k, v in value._asdict().items() if v != getattr(ONE, k)]
            elif value != default:
                told.append(str(value) if field in ("names", "dtype") else f"{field}={value}")
        return " ".join(told).replace("torch.", "") or "plain"


WIDE = {"forward": Config(16, 32, 4, 1), "dkdv": Config(32, 16, 4, 1), "dq": Config(16, 32, 4, 1)}

CASES = [
    Case(),
    Case("causal"),
    Case("causal", TWO, BFLOAT16),
    Case("q_offset", TWO),
    Case("causal", dtype=FLOAT32),
    Case("causal", ONE._replace(seqlen_q=51, seqlen_k=37), config=WIDE),
    Case("causal", ONE._replace(seqlen_q=64, seqlen_k=64, head_dim=16, head_dim_v=16), FLOAT16),
    Case("causal", ONE._replace(seqlen_q=67, seqlen_k=67, head_dim=16, head_dim_v=16), FLOAT32, sigma=16.0),
    Case(options={"scale": -0.3}, dtype=FLOAT32),
    Case("causal", options={"q_offset": -20}, planted="hidden"),
    Case("causal", planted="seen"),
    Case("causal", dtype=BFLOAT16, planted="seen"),
    Case("causal", TWO, needs=("q",), dlse=False),
    Case("causal", TWO, needs=("k",)),
    Case("causal", TWO, needs=("v",), dlse=False),
    *(Case("causal", dtype=BFLOAT16, far=axis) for axis in ("batch", "head", "row", "tile")),
]


class Prepared(NamedTuple):
    """A case with its inputs, what they must give, and what it must cost."""

    case: Case
    inputs: Inputs
    want: Outputs
    plain: Outputs
    floors: dict[str, float]
    work: list[Any]


def place(x: torch.Tensor) -> torch.Tensor:
    return x


def inputs_of(case: Case) -> Inputs:
    """Inputs of a case, the same in every process."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    if case.far:
        x = calls.far_inputs(place, case.far)
    else:
        x = features.call_of(place, case.names.split(), case.sizes, case.dtype, case.sigma)
    x = x._replace(options={**x.options, **case.options})
    if not case.dlse:
        x = x._replace(dlse=None)
    if case.planted == "hidden":
        weight = bounds.oracle(features.known(x._replace(do=torch.ones_like(x.do), dlse=None))).dv
        unseen = (weight == 0).all(-1)
        if not unseen.any():
            raise ValueError(f"{case.name}: every key is seen")
        x.k[unseen], x.v[unseen] = math.nan, math.nan
    elif case.planted == "seen":
        x.q[..., x.q.shape[-2] // 3, 1] = math.nan
        x.k[..., x.k.shape[-2] // 2, 0] = math.nan
        x.v[..., 3, -1] = math.nan
        x.do[..., x.do.shape[-2] // 4, 0] = math.nan
    return x


def prepare(case: Case, traced: Callable[[Callable[[], Outputs]], Outputs]) -> Prepared:
    """Run a case unchanged, inside `traced`, and keep what mutants are compared with; raises where it is wrong."""
    x = inputs_of(case)
    known = features.known(x)
    want = bounds.oracle(known)
    sound = known._replace(**{name: getattr(known, name).nan_to_num(0.0) for name in ("q", "k", "v", "do")})
    plain, floors = bounds.standard(sound), bounds.floors(sound)
    if case.far:  # bit by bit what the same numbers give side by side
        want = plain = run(Prepared(case._replace(far=""), x, want, plain, floors, []))
        floors = dict.fromkeys(floors, 0.0)
    prepared = Prepared(case, x, want, plain, floors, [])
    complaint = wrong(prepared, run(prepared))
    if complaint:
        raise AssertionError(f"{case.name}: {complaint}")
    memory.launches.clear()  # the first call of a dtype may have asked the backend whether it works
    traced(lambda: run(prepared))
    return prepared._replace(work=[*memory.launches])


def run(prepared: Prepared) -> Outputs:
    """Outputs and gradients of a case by the kernels as they now are."""
    case, x, *_ = prepared
    if case.far:  # made anew each time: a process with so much memory to its name cannot fork
        names = ("q", "k", "v", "do")
        x = x._replace(**{name: calls.far_apart(getattr(x, name), case.far, x.q.device) for name in names})
    named = features.differentiable(x)
    wanted = [name for name in named if case.needs is None or name in case.needs]
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in named.items()}
    options = {**x.options, **{name: t for name, t in leaves.items() if name not in "qkv"}}
    o, lse = features.attention("triton", case.config)(leaves["q"], leaves["k"], leaves["v"], **options)
    outputs, gradients = ((o,), (x.do,)) if x.dlse is None else ((o, lse), (x.do, x.dlse))
    found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], gradients)
    return Outputs(o.detach(), lse.detach(), **{f"d{name}": t for name, t in zip(wanted, found, strict=True)})


def check(prepared: Prepared) -> str:
    """What is wrong with a case by the kernels as they now are; empty where nothing is."""
    memory.launches.clear()
    complaint = wrong(prepared, run(prepared))
    if complaint:
        return complaint
    return "" if memory.launches == prepared.work else f"costs {memory.launches}, not {prepared.work}"


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
        dtype = torch.float32 if name == "lse" and prepared.inputs.q.dtype != FLOAT64 else prepared.inputs.q.dtype
        for line in bounds.judge(*tensors, dtype, prepared.floors[name]):
            return f"{name} {line}"
    return ""


def watch_allocations() -> None:
    """Fill what the library allocates with the mark that the memory checker knows; for the whole process."""

    def watched(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            import sys

            x = stock(*args, **kwargs)
            module = sys._getframe(1).f_globals.get("__name__", "")
            return poison(x) if module.startswith("flash.") and x.device.type == "cpu" else x

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, watched(getattr(torch, name)))
    torch.Tensor.new_empty = watched(torch.Tensor.new_empty)  # type: ignore[method-assign, assignment]
