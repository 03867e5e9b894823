"""Attention under torch.func's transforms and in forward mode: autograd Functions that know vmap and tangents.

`flash/autograd.py` has the cheaper Function of a plain backward pass. Those here take (*tensors, sealed call,
*operands), and say three things more.

    vmap    a mapped axis joins the batch: [size, batch, ...] -> [size * batch, ...]. Where a sequence's number matters
            (dropout, user functions, block masks, packed sequences), or where that would copy a mask, call after call.
    jvp     the tangents of o and lse, by an op that computes the weights again from lse: O(n) memory
    twice   a derivative of a gradient, or of a tangent, raises
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from .kernels.spec import Gradients, Spans
from .ops import DIFFERENTIABLE, PLAIN, TEXT, library, spec_of

TWICE = (
    "flash_attention is differentiable once, backward or forward: detach what the first derivative gives, or use "
    "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
)
FIXED = (
    "no gradient and no tangent reaches the tensors of score_mod, mask_mod and block_mask: detach them, or pass what "
    "is learned as bias, which has both"
)
OF_FORWARD = ("q", "k", "v")
OF_BACKWARD = ("do", "dlse", *OF_FORWARD, "o", "lse")
OF_JVP = ("tangent of q", "tangent of k", "tangent of v", *DIFFERENTIABLE, *OF_FORWARD, "o", "lse")
NUMBERED = ("seed", "starts_q", "starts_k", "bad")  # operands of calls in which a sequence's number matters
LARGE = ("mask", "bias")  # operands that are never copied
WHOLE = ("q_offset", *OF_BACKWARD, *OF_JVP[:3])  # what has an axis of batch that is not broadcast


class Sealed:
    """A call as one leaf of torch's pytrees, which else take all of its numbers apart at every transform."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call


class Attention(torch.autograd.Function):
    """o and lse of (q, k, v, call, *operands)."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return run(torch.ops.flash.forward, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        q, k, v, sealed, *operands = inputs
        ctx.save_for_backward(q, k, v, *output, *operands)
        ctx.save_for_forward(q, k, v, *output, *operands)
        ctx.call = sealed.call
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return gradients_of(Backward, ctx, do, dlse, Sealed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        q, k, v, o, lse, *operands = ctx.saved_tensors
        refuse_fixed([x is not None for x in tangents])
        others = (tangents[4 + PLAIN.index(name)] for name in DIFFERENTIABLE)
        return Tangents.apply(*tangents[:3], *others, q, k, v, o, lse, Sealed(ctx.call), *operands)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
        return mapped(Attention.apply, OF_FORWARD, info.batch_size, axes, inputs)


class Once(torch.autograd.Function):
    """What has no derivative, and says so."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(TWICE)


class Backward(Once):
    """The wanted gradients of (do, dlse, q, k, v, o, lse, call, *operands); the last of a call says which."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return tuple(run(torch.ops.flash.backward, inputs))

    @staticmethod
    def vmap(info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
        return mapped(Backward.apply, OF_BACKWARD, info.batch_size, axes, inputs)


class Tangents(Once):
    """The tangents of o and lse, of (those of q, k, v, bias, slopes and sinks, q, k, v, o, lse, call, *operands)."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return run(torch.ops.flash.jvp, inputs)

    @staticmethod
    def vmap(info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
        return mapped(Tangents.apply, OF_JVP, info.batch_size, axes, inputs)


def gradients_of(
    function: Any, ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None, seal: Callable[..., Any] = tuple
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of an Attention's inputs, by the Function that finds them."""
    q, k, v, o, lse, *operands = ctx.saved_tensors
    asked = ctx.needs_input_grad
    refuse_fixed(asked)
    needs = [*asked[:3], *(asked[4 + PLAIN.index(name)] for name in DIFFERENTIABLE)]
    if do is None:
        do = o.new_zeros(()).expand_as(o)
    found = iter(function.apply(do, dlse, q, k, v, o, lse, seal((*ctx.call, needs)), *operands))
    gradients = Gradients(*(next(found) if need else None for need in needs))
    of_operands = (getattr(gradients, name) if name in DIFFERENTIABLE else None for name in PLAIN)
    return *gradients[:3], None, *of_operands, *(None for _ in operands[len(PLAIN) :])


def refuse_fixed(asked: Sequence[bool]) -> None:
    """Raise where a derivative is asked for by an input that has none: of (q, k, v, call, *operands), which are."""
    if any(asked[4 + len(PLAIN) :]):
        raise NotImplementedError(FIXED)


@_disable_dynamo  # else, where a transform is around a compiled function, it traces the Functions and fails
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: tuple[Any, ...], *operands: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse under whatever watches the tensors."""
    return Attention.apply(q, k, v, Sealed(call), *operands)  # type: ignore[no-untyped-call,no-any-return]


def active() -> bool:
    """Whether a transform of torch.func or a level of forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a transform of torch.func sees a call's tensors, or one of them carries a tangent."""
    if torch._C._are_functorch_transforms_active():
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            return True
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return True  # torch takes no other kind of Function under a transform
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def run(op: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """An op on a Function's inputs: tensors, the call, operands."""
    at = next(at for at, x in enumerate(inputs) if isinstance(x, Sealed))
    return op(*inputs[:at], inputs[at + 1 :], *inputs[at].call)


def mapped(
    function: Callable[..., Any], names: tuple[str, ...], size: int, axes: Sequence[Any], inputs: Sequence[Any]
) -> tuple[Any, Any]:
    """A Function over a mapped axis of its inputs: the outputs, and which of their axes is the mapped one, the first.

    Args:
        function: of (*tensors, call, *operands).
        names: of the tensors.
        size: of the mapped axis.
        axes: which axis of each input is mapped; None of one that is alike for all.
        inputs: of the function.
    """
    axes = [axis if isinstance(x, torch.Tensor) else None for x, axis in zip(inputs, axes, strict=True)]
    if size == 0:  # the shapes are those of one call
        one = (
            x if axis is None else x.new_zeros(x.movedim(axis, 0).shape[1:])
            for x, axis in zip(inputs, axes, strict=True)
        )
        outputs = tuple(x.new_empty(0, *x.shape) for x in function(*one))
    elif (joined := join(names, size, axes, inputs)) is not None:
        outputs = tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in function(*joined))
    else:
        each = (
            function(*(x if axis is None else x.select(axis, i) for x, axis in zip(inputs, axes, strict=True)))
            for i in range(size)
        )
        outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)


def join(names: tuple[str, ...], size: int, axes: Sequence[int | None], inputs: Sequence[Any]) -> list[Any] | None:
    """A Function's inputs, the mapped axis part of the batch; None where that would be another call, or a copy."""
    call = inputs[len(names)].call
    _, (blocks, spans, *mods), _ = spec_of(call[TEXT])
    if blocks or any(mods):
        return None
    needs = call[-1][3:] if names is OF_BACKWARD else ()
    summed = [name for name, need in zip(DIFFERENTIABLE, needs, strict=False) if need]  # over the batch
    every = [*names, "call", *PLAIN, *(Spans._fields if spans else ())]
    q = names.index("q")
    batch = [n for axis, n in enumerate(inputs[q].shape) if axis != axes[q]][0]
    joined: list[Any] = []
    for name, x, axis in zip(every, inputs, axes, strict=True):
        if not isinstance(x, torch.Tensor):
            joined.append(x)
            continue
        sizes = [n for at, n in enumerate(x.shape) if at != axis]
        alone = axis is None and name not in WHOLE and name not in summed
        if name in NUMBERED or (name == "sinks" and not alone):
            return None
        if alone and (name == "sinks" or sizes[0] == 1):
            joined.append(x)  # broadcast as before
        elif sizes[0] != batch or (axis is None and name in LARGE and batch > 1):
            return None
        else:
            x = x.expand(size, *sizes) if axis is None else x.movedim(axis, 0)
            joined.append(x.flatten(0, 1))
    return joined


def rule(op: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """What an op that is called under vmap itself does, without autograd: as the Function above it."""

    def vmap(info: Any, axes: tuple[Any, ...], *given: Any) -> Any:
        at = len(names)
        inputs = (*given[:at], Sealed(given[at + 1 :]), *given[at])
        every = (*axes[:at], None, *(axes[at] if axes[at] is not None else (None,) * len(given[at])))
        outputs, places = mapped(lambda *inputs: run(op, inputs), names, info.batch_size, every, inputs)
        return (list(outputs), list(places)) if names is OF_BACKWARD else (outputs, places)

    return vmap


for name, names in (("forward", OF_FORWARD), ("backward", OF_BACKWARD), ("jvp", OF_JVP)):
    torch.library.register_vmap(f"flash::{name}", rule(getattr(torch.ops.flash, name), names), lib=library)
