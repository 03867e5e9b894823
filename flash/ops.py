"""The raw ops of torch, `flash::forward`, `flash::backward` and `flash::jvp`: what they take, their fakes, their guard.

They are opaque to torch.compile, and carry no autograd formula: a formula below functorch's transforms makes some of
them return zeros in silence. The Functions above them (autograd.py, functorch.py) have the formula, and the guard on
the ops raises wherever a gradient or a tangent would be dropped. Floating-point operations are counted as torch counts
those of scaled_dot_product_attention: every pair of a query and a key, hidden or not.
"""

import ast
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .kernels.spec import (
    Blocks,
    Config,
    Gradients,
    Mods,
    Positions,
    Spans,
    Spec,
    accumulator_dtype,
    dense_like,
    output_dtype,
)
from .problem import Problem
from .twins import from_handle, handle_of

CALL = "Tensor?[] operands, float scale, SymInt[] positions, str spec, str backend, int[] configs"

library = torch.library.Library("flash", "DEF")
library.define(f"forward(Tensor q, Tensor k, Tensor v, {CALL}) -> (Tensor o, Tensor lse)")
library.define(
    "backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{CALL}, bool[] needs) -> Tensor[]"
)
library.define(
    "jvp(Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tslopes, Tensor? tsinks, "
    f"Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {CALL}) -> (Tensor to, Tensor tlse)"
)
library.define("lost(Tensor q) -> Tensor")

PLAIN = Mods._fields[: Mods._fields.index("blocks")]  # operands that are one tensor each
GROUPS: dict[str, Any] = {"blocks": Blocks, "spans": Spans}  # NamedTuples of tensors
MODS = ("score_mod", "mask_mod")
ABSENT = (0,) * len(Config._fields)  # stands for a Config that the user leaves to the tables
DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")
LOST = (
    "{} has no derivative, and the one asked for would be lost: call flash.attention.flash_attention, outside "
    "torch.compile where it is by a torch.func transform or in forward mode; an exported program runs under "
    "torch.no_grad()"
)
TEXT = 2  # where a call has its Spec


def flatten(mods: Mods) -> tuple[list[torch.Tensor | None], tuple[Any, ...]]:
    """The tensors of Mods in one list, and what it takes to put them back: flags of groups, handles and counts."""
    operands: list[torch.Tensor | None] = [getattr(mods, name) for name in PLAIN]
    rest: list[Any] = []
    for name in GROUPS:
        group = getattr(mods, name)
        operands += [] if group is None else group
        rest.append(group is not None)
    for name in MODS:
        mod = getattr(mods, name)
        operands += () if mod is None else mod.args
        rest.append(None if mod is None else (handle_of(mod), len(mod.args)))
    return operands, tuple(rest)


def unflatten(operands: Sequence[torch.Tensor | None], rest: tuple[Any, ...]) -> Mods:
    """What `flatten` took apart."""
    found: dict[str, Any] = dict(zip(PLAIN, operands, strict=False))
    left: Any = iter(operands[len(PLAIN) :])
    for (name, group), there in zip(GROUPS.items(), rest[: len(GROUPS)], strict=True):
        found[name] = group(*(next(left) for _ in group._fields)) if there else None
    for name, mod in zip(MODS, rest[len(GROUPS) :], strict=True):
        found[name] = None if mod is None else from_handle(mod[0], tuple(next(left) for _ in range(mod[1])))
    return Mods(**found)


@lru_cache(maxsize=1024)
def spec_of(text: str) -> tuple[Spec, tuple[Any, ...], bool]:
    """The Spec, what `unflatten` needs, and whether to be deterministic, that crossed an op's boundary as text."""
    spec, rest, deterministic = ast.literal_eval(text)
    return Spec(*spec), rest, deterministic


def configs_of(numbers: Sequence[int]) -> tuple[Config | None, Config | None, Config | None]:
    """The three Configs that crossed an op's boundary as numbers, one a field; zeros stand for an absent one."""
    width = len(ABSENT)
    parts = (numbers[i * width : (i + 1) * width] for i in range(3))
    forward, dkdv, dq = (Config._make((*part[:-1], bool(part[-1]))) if part[0] else None for part in parts)
    return forward, dkdv, dq


def call_of(problem: Problem) -> tuple[Any, ...]:
    """What an op needs of a Problem beside q, k and v, in the schema's order."""
    numbers = [int(number) for config in problem.configs for number in config or ABSENT]
    operands, rest = flatten(problem.mods)
    text = str((tuple(problem.spec), rest, problem.deterministic))
    return operands, problem.scale, list(problem.positions), text, problem.backend, numbers


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> Problem:
    """The Problem that `call_of` took apart."""
    operands, scale, positions, text, backend, numbers = call
    spec, rest, deterministic = spec_of(text)
    mods = unflatten(operands, rest)
    return Problem(
        q, k, v, mods, spec, scale, Positions(*positions), backend, configs_of(numbers), False, deterministic
    )  # fmt: skip


def forward_impl(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return dispatch.forward(problem_of(q, k, v, *call))


def forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operands: Any, *call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    spec, *_ = spec_of(call[TEXT])
    o = dense_like(q, v.shape[3], dtype=output_dtype(q, spec))
    return o, q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))


def backward_impl(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> list[torch.Tensor]:
    *call, needs = rest
    gradients = dispatch.backward(problem_of(q, k, v, *call), do, dlse, o, lse, Gradients(*needs))
    return [gradient for gradient in gradients if gradient is not None]


def backward_fake(
    do: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> list[torch.Tensor]:
    _o, _lse, operands, *call, needs = rest
    spec, *_ = spec_of(call[TEXT])
    found = [
        torch.empty_like(x, dtype=output_dtype(x, spec)) for x, need in zip((q, k, v), needs[:3], strict=True) if need
    ]
    others = zip(DIFFERENTIABLE, needs[3:], strict=True)
    return found + [torch.empty_like(operands[PLAIN.index(name)]) for name, need in others if need]


def jvp_impl(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tangents, (q, k, v, o, lse, *call) = Gradients(*args[:6]), args[6:]
    return dispatch.jvp(problem_of(q, k, v, *call), tangents, o, lse)


def jvp_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, _, _, *call = args[6:]
    return forward_fake(q, k, v, *call)


def would_lose(x: torch.Tensor) -> bool:
    """Whether x carries a gradient or a tangent that an op without a formula would drop."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x) and torch._C._functorch.is_gradtrackingtensor(x):
        return True
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_exporting():
        return True  # what export only writes down is asked again when it is run
    watching = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    return watching and forward_ad.unpack_dual(x).tangent is not None


def watching() -> bool:
    """Whether torch's state asks for more than a call's values: transforms, modes, tracing, autocast."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()
    )


def batched(*args: Any) -> Any:
    """An op's kernel under torch's older vmap, which autograd still has inside."""
    raise NotImplementedError(
        "flash_attention does not serve is_grads_batched, nor what is made with it (vectorize=True of "
        "torch.autograd.functional, check_batched_grad): use torch.func.jacrev, or torch.func.vmap over autograd.grad"
    )


def guarded(op: Any) -> Callable[..., Any]:
    """The op's kernel at the Autograd key: raises where a derivative would be lost, else goes on below."""

    def kernel(*args: Any) -> Any:
        flat = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        if any(would_lose(x) for x in flat if isinstance(x, torch.Tensor)):
            raise RuntimeError(LOST.format(op))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (forward_impl, forward_fake),
    "backward": (backward_impl, backward_fake),
    "jvp": (jvp_impl, jvp_fake),
}
for name, (impl, fake) in OPS.items():
    library.impl(name, impl, "CompositeExplicitAutograd")
    library.impl(name, guarded(getattr(torch.ops.flash, name)), "Autograd")
    library.impl(name, batched, "Batched")
    torch.library.register_fake(f"flash::{name}", fake, lib=library)


def lost(q: torch.Tensor) -> torch.Tensor:
    """An op that only raises: an exception of Python's would make the compiler break its graph there, and go on."""
    raise RuntimeError(LOST.format("flash.forward"))


library.impl("lost", lost, "CompositeExplicitAutograd")
torch.library.register_fake("flash::lost", lost, lib=library)


def pairs_of(q: torch.Tensor, k: torch.Tensor, operands: Sequence[torch.Tensor | None]) -> int:
    """How many scores a call has: batch * heads * seqlen_q * seqlen_k, or the sum of that over packed sequences."""
    starts_q, starts_k = (operands[PLAIN.index(name)] for name in ("starts_q", "starts_k"))
    if starts_q is None or starts_k is None:
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if starts_q.device.type == "meta" or isinstance(starts_q, FakeTensor):  # lengths unknown: as if they were alike
        return q.shape[1] * q.shape[2] * k.shape[2] // max(len(starts_q) - 1, 1)
    return q.shape[1] * int((starts_q.diff().long() * starts_k.diff()).sum())


def forward_flops(q: Any, k: Any, v: Any, operands: Any, *_: Any, **__: Any) -> int:
    widths: int = q.shape[3] + v.shape[3]
    return 2 * pairs_of(q, k, operands) * widths


def backward_flops(
    do: Any, dlse: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, operands: Any, *_: Any, **__: Any
) -> int:
    widths: int = 3 * q.shape[3] + 2 * v.shape[3]
    return 2 * pairs_of(q, k, operands) * widths


def jvp_flops(tq: Any, tk: Any, tv: Any, *rest: Any, **_: Any) -> int:
    q, k, v, _o, _lse, operands = rest[3:9]
    widths: int = q.shape[3] * (1 + (tq is not None) + (tk is not None)) + v.shape[3] * (1 + (tv is not None))
    return 2 * pairs_of(q, k, operands) * widths


for name, flops in (("forward", forward_flops), ("backward", backward_flops), ("jvp", jvp_flops)):
    register_flop_formula(getattr(torch.ops.flash, name), get_raw=True)(flops)
