"""What torch does with a function, as data: each transform of attention beside what plain autograd says of the oracle.

A Call is attention as a function of all its differentiable operands, and the numbers that transforms need beside it. A
transform takes it to a result; `whole` wraps what torch.compile may compile of that, or leaves it as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from flash import reference
from flash.attention import flash_attention, flash_attention_varlen
from tests import bounds, features
from tests.bounds import Inputs

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Any]
Transform = Callable[["Call", Callable[[Function], Function]], Tensors]
SEVERAL = 3  # sets of operands under vmap
STEPS, SUMS = 3, 4  # numbers that enter and leave the function whose Jacobian is taken


class Call(NamedTuple):
    """(o, lse) = function(*operands), lse 0 where it is infinite."""

    function: Function
    operands: Tensors
    along: Tensors  # a direction of each operand
    several: Tensors  # SEVERAL sets of operands, stacked
    steps: tuple[Tensors, ...]  # STEPS directions
    back: Tensors  # cotangents of o and lse
    sums: tuple[Tensors, ...]  # SUMS of them

    def loss(self, *operands: torch.Tensor) -> torch.Tensor:
        """<back, (o, lse)>."""
        return inner(self.back, self.function(*operands))

    def curved(self, *operands: torch.Tensor) -> torch.Tensor:
        """A loss whose gradients at o depend on o: what is lost on the way back shows."""
        return inner(self.back, [x.square() for x in self.function(*operands)])

    def narrow(self, t: torch.Tensor) -> torch.Tensor:
        """SUMS numbers, of the operands moved along STEPS directions by t [STEPS]."""
        moved = self.operands
        for number, step in zip(t, self.steps, strict=True):
            moved = tuple(x + number * s for x, s in zip(moved, step, strict=True))
        outputs = self.function(*moved)
        return torch.stack([inner(weights, outputs) for weights in self.sums])

    def leaves(self) -> Tensors:
        return tuple(x.detach().requires_grad_() for x in self.operands)

    def t(self) -> torch.Tensor:
        return self.operands[0].new_zeros(STEPS)

    def every(self) -> tuple[int, ...]:
        return tuple(range(len(self.operands)))


def inner(xs: Any, ys: Any) -> torch.Tensor:
    """<xs, ys>."""
    x, y = ((a * b).sum() for a, b in zip(xs, ys, strict=True))
    return x + y


def call_of(attention: Function, x: Inputs) -> Call:
    """A Call of (q, k, v, **options) -> (o, lse); the numbers beside it are the same for the same x."""
    assert x.do is not None and x.dlse is not None
    function, named = features.of_operands(attention, x)
    operands, back = tuple(named), (x.do, x.dlse)
    torch.manual_seed(0)

    def near(tensors: Tensors) -> Tensors:
        return tuple(torch.randn_like(t) for t in tensors)

    sets = [operands, *(tuple(a + b for a, b in zip(operands, near(operands), strict=True)) for _ in range(1, SEVERAL))]
    several = tuple(torch.stack(parts) for parts in zip(*sets, strict=True))
    steps, sums = tuple(near(operands) for _ in range(STEPS)), tuple(near(back) for _ in range(SUMS))
    return Call(function, operands, near(operands), several, steps, back, sums)


def ours(x: Inputs, backend: str) -> Call:
    """The public call; its dropout draws from torch's generator as that stands."""
    public: Any = flash_attention_varlen if "cu_seqlens_q" in x.options else flash_attention
    tiles: Any = features.within_blocks(features.TILES) if "block_mask" in x.options else features.TILES

    def attention(*args: torch.Tensor, **options: Any) -> Any:
        return public(*args, return_lse=True, backend=backend, config=tiles, **options)

    return call_of(attention, x)


def oracle(x: Inputs) -> Call:
    """flash.reference, float64; of dropout the mask that a call draws after torch.manual_seed(features.SEED)."""

    def attention(*args: Any, **options: Any) -> Any:
        return reference.attention(*args, return_lse=True, **options)

    return call_of(bounds.dense_or_packed(attention), bounds.widened(features.known(x)))


def forward(c: Call, whole: Any) -> Tensors:
    return whole(c.function)(*c.operands)


def backward(c: Call, whole: Any) -> Tensors:
    leaves = c.leaves()
    return torch.autograd.grad(whole(c.curved)(*leaves), leaves)


def func_grad(c: Call, whole: Any) -> Tensors:
    return whole(grad(c.curved, c.every()))(*c.operands)


def mapped(c: Call, whole: Any) -> Tensors:
    return whole(vmap(c.function, randomness="same"))(*c.several)


def mapped_grad(c: Call, whole: Any) -> Tensors:
    return whole(vmap(grad(c.curved, c.every()), randomness="same"))(*c.several)


def reverse_jacobian(c: Call, whole: Any) -> Tensors:
    return (whole(jacrev(c.narrow))(c.t()),)


def tangents(c: Call, whole: Any) -> Tensors:
    primals, moved = whole(lambda xs, along: jvp(c.function, xs, along))(c.operands, c.along)
    return *primals, *moved


def dual(c: Call, whole: Any) -> Tensors:
    def through(*both: torch.Tensor) -> Tensors:
        half = len(both) // 2
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(both[:half], both[half:], strict=True)]
            parts = [forward_ad.unpack_dual(x) for x in c.function(*duals)]
            return tuple(p.primal for p in parts) + tuple(p.tangent for p in parts)

    return whole(through)(*c.operands, *c.along)


def forward_jacobian(c: Call, whole: Any) -> Tensors:
    return (whole(jacfwd(c.narrow, randomness="same"))(c.t()),)


def detached_tangent(c: Call, whole: Any) -> Tensors:
    """MeanFlow's loss: |o - stopgrad(o - its tangent)|^2, whose gradient is that of o, times twice its tangent."""

    def loss(*operands: torch.Tensor) -> torch.Tensor:
        (o, _), (moved, _) = jvp(c.function, operands, c.along)
        return (o - (o - moved).detach()).square().sum()

    leaves = c.leaves()
    return torch.autograd.grad(whole(loss)(*leaves), leaves, materialize_grads=True)


def functional_detached_tangent(c: Call, whole: Any) -> Tensors:
    def loss(*operands: torch.Tensor) -> torch.Tensor:
        (o, _), (moved, _) = jvp(c.function, operands, c.along)
        return (o - (o - moved).detach()).square().sum()

    return whole(grad(loss, c.every()))(*c.operands)


def twice(c: Call, whole: Any) -> Tensors:
    leaves = c.leaves()
    first = torch.autograd.grad(whole(c.curved)(*leaves), leaves, create_graph=True)
    torch.stack([x.sum() for x in first]).sum().backward()  # grad() does not always reach where torch.compile raises
    return tuple(x.grad for x in leaves if x.grad is not None)


def tangent_twice(c: Call, whole: Any) -> Tensors:
    def squared(*operands: torch.Tensor) -> torch.Tensor:
        return jvp(c.function, operands, c.along)[1][0].square().sum()

    return whole(grad(squared, c.every()))(*c.operands)


def gradient_tangent(c: Call, whole: Any) -> Tensors:
    return whole(lambda xs, along: jvp(grad(c.curved, c.every()), xs, along))(c.operands, c.along)[1]


def recomputed(c: Call, whole: Any) -> Tensors:
    leaves = c.leaves()
    loss = whole(lambda *xs: checkpoint(c.curved, *xs, use_reentrant=False))(*leaves)
    torch.manual_seed(features.SEED + 1)  # what is recomputed must draw what it drew
    return torch.autograd.grad(loss, leaves)


def mapped_then_backward(c: Call, whole: Any) -> Tensors:
    leaves = tuple(x.detach().requires_grad_() for x in c.several)
    return torch.autograd.grad(whole(vmap(c.curved, randomness="same"))(*leaves).sum(), leaves)


def batched_backward(c: Call, whole: Any) -> Tensors:
    leaves = c.leaves()
    outputs = whole(c.function)(*leaves)
    cotangents = (torch.stack(parts) for parts in zip(*c.sums, strict=True))
    return vmap(lambda *back: torch.autograd.grad(outputs, leaves, back, retain_graph=True))(*cotangents)


TRANSFORMS: dict[str, Transform] = {
    "forward": forward,
    "backward": backward,
    "checkpoint": recomputed,
    "vmap": mapped,
    "backward of vmap": mapped_then_backward,
    "batched backward": batched_backward,
    "grad": func_grad,
    "vmap(grad)": mapped_grad,
    "jacrev": reverse_jacobian,
    "jvp": tangents,
    "dual": dual,
    "jacfwd": forward_jacobian,
    "backward of o beside jvp": detached_tangent,
    "grad of o beside jvp": functional_detached_tangent,
    "double backward": twice,
    "grad(jvp)": tangent_twice,
    "jvp(grad)": gradient_tangent,
}


def moved_by(c: Call) -> Tensors:
    outputs, moved = torch.autograd.functional.jvp(c.function, c.operands, c.along)
    return *outputs, *moved


def one_by_one(c: Call, of: Function) -> Tensors:
    """A function of each set of several operands, stacked."""
    results = [of(c._replace(operands=tuple(x[i] for x in c.several))) for i in range(SEVERAL)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def gradients(c: Call) -> Tensors:
    leaves = c.leaves()
    return torch.autograd.grad(c.curved(*leaves), leaves)


def by_cotangents(c: Call) -> Tensors:
    leaves = c.leaves()
    outputs = c.function(*leaves)
    each = [torch.autograd.grad(outputs, leaves, back, retain_graph=True) for back in c.sums]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def beside_tangent(c: Call) -> Tensors:
    leaves = c.leaves()
    moved = moved_by(c)[2]
    return torch.autograd.grad(c.function(*leaves)[0], leaves, 2 * moved, materialize_grads=True)


def jacobian(c: Call) -> Tensors:
    return (torch.autograd.functional.jacobian(c.narrow, c.t()),)


WANTED: dict[str, Callable[[Call], Tensors]] = {
    "forward": lambda c: c.function(*c.operands),
    "backward": gradients,
    "checkpoint": gradients,
    "vmap": lambda c: one_by_one(c, lambda one: one.function(*one.operands)),
    "backward of vmap": lambda c: one_by_one(c, gradients),
    "batched backward": by_cotangents,
    "grad": gradients,
    "vmap(grad)": lambda c: one_by_one(c, gradients),
    "jacrev": jacobian,
    "jvp": moved_by,
    "dual": moved_by,
    "jacfwd": jacobian,
    "backward of o beside jvp": beside_tangent,
    "grad of o beside jvp": beside_tangent,
}
