"""From a Problem to o and lse, with gradients: which of torch's layers a call goes through.

inputs that torch.func or forward mode watches     the Functions of `flash/functorch.py`
an input that requires a gradient                  the Function here, which costs least; none while exporting
anything else                                      the raw op
"""

from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from . import dispatch, functorch
from .functorch import TWICE, gradients_of
from .kernels.spec import Gradients
from .ops import DIFFERENTIABLE, call_of
from .problem import Problem


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
        call: tuple[Any, ...],
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ops.flash.backward(do, dlse, q, k, v, o, lse, operands, *call))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise NotImplementedError(TWICE)


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
        if not torch.compiler.is_compiling() and functorch.active():  # batched gradients, transforms of a backward
            return gradients_of(functorch.Backward, ctx, do, dlse, functorch.Sealed)
        return gradients_of(AttentionBackward, ctx, do, dlse)


class Exported(torch.autograd.Function):
    """o and lse where torch.export traces: the op alone is written down; to differentiate it meanwhile raises."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, call, *operands = inputs
        return torch.ops.flash.forward(q, k, v, operands, *call)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(
            "torch.export keeps no gradient of flash_attention: take it outside the exported module"
        )


def attend(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Problem: through autograd where an input asks for a gradient, through the raw op elsewhere."""
    q, k, v, mods = problem.q, problem.k, problem.v, problem.mods
    if problem.spec.dropout_p > 0 and mods.seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), device=q.device)  # on the device: manual_seed and CUDA graphs reach it
        problem = replace(problem, mods=mods._replace(seed=seed))
    inputs = [q, k, v, *(x for x in (getattr(mods, name) for name in DIFFERENTIABLE) if x is not None)]
    operands, *call = call_of(problem)
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # a compiler may drop a tangent before our op could see it
            q = torch.ops.flash.lost(q)
    else:
        # torch does it for a tensor argument, but not for one in a list
        operands = [None if x is None else x.resolve_neg() for x in operands]
        if functorch.active() and functorch.watched([q, k, v, *(x for x in operands if x is not None)]):
            return functorch.attend(q, k, v, tuple(call), *operands)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if not differentiable or torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
        # strict export would keep a Function's forward without its backward, in silence; a raw op raises when it is run
        o, lse = torch.ops.flash.forward(q, k, v, operands, *call)
    elif torch.compiler.is_exporting():
        o, lse = Exported.apply(q, k, v, tuple(call), *operands)  # type: ignore[no-untyped-call]
    else:
        if torch.compiler.is_compiling():
            q, k, v, *operands = distinct([q, k, v, *operands])
        elif problem.backend == "hopper":  # which may refuse the backward alone: now, and not after the forward
            needs = (x is not None and x.requires_grad for x in (q, k, v, *(getattr(mods, n) for n in DIFFERENTIABLE)))
            dispatch.chosen(problem, "backward", Gradients(*needs))
        o, lse = Attention.apply(q, k, v, tuple(call), *operands)  # type: ignore[no-untyped-call]
    return o, lse


def distinct(tensors: list[Any]) -> list[Any]:
    """The tensors, views of those that came before: torch.compile takes none twice into an autograd.Function."""
    found: list[Any] = []
    for x in tensors:
        found.append(x if x is None or all(x is not y for y in found) else x.view_as(x))
    return found
