"""Where attention meets torch: raw ops, their fakes, the guard against lost gradients, and the autograd Function.

The raw ops `flash::forward` and `flash::backward` are opaque to torch.compile. They carry no autograd formula: a
formula below functorch's transforms makes some of them return zeros in silence. The Function above them has the
formula, and the guard on the ops raises wherever a gradient or a tangent would be dropped.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad

from . import dispatch
from .kernels.spec import Blocks, Config, Gradients, Mods, Positions, Spans, Spec, dense_like
from .problem import Problem
from .twins import from_handle, handle_of

CALL = "Tensor?[] operands, float scale, SymInt[] positions, str spec, str backend, int[] configs"

library = torch.library.Library("flash", "DEF")
library.define(f"forward(Tensor q, Tensor k, Tensor v, {CALL}) -> (Tensor o, Tensor lse)")
library.define(
    "backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{CALL}, bool[] needs) -> Tensor[]"
)

PLAIN = Mods._fields[: Mods._fields.index("blocks")]  # operands that are one tensor each
GROUPS: dict[str, Any] = {"blocks": Blocks, "spans": Spans}  # NamedTuples of tensors
MODS = ("score_mod", "mask_mod")
ABSENT = (0,) * len(Config._fields)  # stands for a Config that the user leaves to the tables
DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")


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


def forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return dense_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


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
    operands, needs = rest[2], rest[-1]  # after o and lse
    inputs = (q, k, v, *(operands[PLAIN.index(name)] for name in DIFFERENTIABLE))
    return [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]


def would_lose(x: torch.Tensor) -> bool:
    """Whether x carries a gradient or a tangent that an op without a formula would drop."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x) and torch._C._functorch.is_gradtrackingtensor(x):
        return True
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def guarded(op: Any) -> Callable[..., Any]:
    """The op's kernel at the Autograd key: raises where a derivative would be lost, else goes on below."""

    def kernel(*args: Any) -> Any:
        flat = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        if any(would_lose(x) for x in flat if isinstance(x, torch.Tensor)):
            raise RuntimeError(
                f"{op} has no derivative, and the one asked for would be lost: call flash.attention.flash_attention, "
                "outside torch.compile where it is by a torch.func transform or in forward mode"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


for name, impl, fake in (("forward", forward_impl, forward_fake), ("backward", backward_impl, backward_fake)):
    library.impl(name, impl, "CompositeExplicitAutograd")
    library.impl(name, guarded(getattr(torch.ops.flash, name)), "Autograd")
    torch.library.register_fake(f"flash::{name}", fake, lib=library)


class AttentionBackward(torch.autograd.Function):
    """The wanted gradients. They have no derivative of their own, and say so whichever input it is asked through."""

    @staticmethod
    def forward(
        ctx: Any,
        do: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        call: Sequence[Any],
        needs: Sequence[bool],
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ops.flash.backward(do, dlse, q, k, v, o, lse, operands, *call, needs))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise NotImplementedError(
            "flash_attention is differentiable once: for a second derivative use "
            "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
        )


class Attention(torch.autograd.Function):
    """o and lse, differentiable once with respect to q, k, v, bias, alibi_slopes and sinks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: tuple[Any, ...],
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = torch.ops.flash.forward(q, k, v, operands, *call)
        ctx.save_for_backward(q, k, v, o, lse, *operands)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse, *operands = ctx.saved_tensors
        asked = ctx.needs_input_grad
        needs = [*asked[:3], *(asked[4 + PLAIN.index(name)] for name in DIFFERENTIABLE)]
        if do is None:
            do = o.new_zeros(()).expand_as(o)
        outputs = AttentionBackward.apply(do, dlse, q, k, v, o, lse, ctx.call, needs, *operands)  # type: ignore[no-untyped-call]
        found = iter(outputs)
        gradients = Gradients(*(next(found) if need else None for need in needs))
        of_operands = (getattr(gradients, name) if name in DIFFERENTIABLE else None for name in PLAIN)
        return *gradients[:3], None, *of_operands, *(None for _ in operands[len(PLAIN) :])


def attend(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Problem: through autograd where an input asks for a gradient, through the raw op elsewhere."""
    q, k, v, mods = problem.q, problem.k, problem.v, problem.mods
    if problem.spec.dropout_p > 0:
        seed = torch.randint(0, 2**63 - 1, (1,), device=q.device)  # on the device: manual_seed and CUDA graphs reach it
        problem = replace(problem, mods=mods._replace(seed=seed))
    inputs = [q, k, v, *(x for x in (getattr(mods, name) for name in DIFFERENTIABLE) if x is not None)]
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        every = [*inputs, *(x for x in flatten(mods)[0] if x is not None)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in every):
            raise NotImplementedError("torch.func transforms are not served yet; use backward() or torch.autograd.grad")
    operands, *call = call_of(problem)
    if not torch.compiler.is_compiling():  # torch does it for a tensor argument, but not for one in a list
        operands = [None if x is None else x.resolve_neg() for x in operands]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if torch.compiler.is_compiling():
            q, k, v, *operands = distinct([q, k, v, *operands])
        elif problem.backend == "hopper":  # which may refuse the backward alone: now, and not after the forward
            needs = (x is not None and x.requires_grad for x in (q, k, v, *(getattr(mods, n) for n in DIFFERENTIABLE)))
            dispatch.chosen(problem, "backward", Gradients(*needs))
        o, lse = Attention.apply(q, k, v, tuple(call), *operands)  # type: ignore[no-untyped-call]
    else:
        o, lse = torch.ops.flash.forward(q, k, v, operands, *call)
    return o, lse


def distinct(tensors: list[Any]) -> list[Any]:
    """The tensors, views of those that came before: torch.compile takes none twice into an autograd.Function."""
    found: list[Any] = []
    for x in tensors:
        found.append(x if x is None or all(x is not y for y in found) else x.view_as(x))
    return found
