"""ring_attention as torch sees it: two opaque ops, the choice among the methods, and an autograd Function above.

All that is said between ranks is said within an op, so that torch.compile traces a call as it does any other. The ops
carry no autograd formula and are guarded like those of `flash/ops.py`.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ring_methods, ulysses
from .autograd import distinct
from .kernels.spec import Gradients, accumulator_dtype, dense_like
from .links import Links, agree
from .ops import guarded, library
from .ring_call import DIFFERENTIABLE, OPERANDS, Call, Layout, Setting, read, unflatten
from .ring_methods import Output

METHODS = ("auto", "ring", "all_gather", "ulysses")
# Rows of a rank times heads that share a key head: floating-point operations for each byte of keys in half precision
# that a hop brings. `python -m bench.run --suite scale` has hops between H200s take less time than the products from
# 3200 on, and from 5000 on where causal, at an assumed 600 TFLOP/s, NVLink's nominal 450 GB/s and 10 us.
HIDDEN = 4096
GATHERED = 2**28  # bytes of all keys and values, from where on each rank's having them is no small matter

CALL = "Tensor?[] tensors, str call"
library.define(f"ring_forward(Tensor q, Tensor k, Tensor v, {CALL}) -> (Tensor o, Tensor lse, Tensor said)")
library.define(
    "ring_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor said, "
    f"{CALL}, bool[] needs) -> Tensor[]"
)


def choose(call: Call, layout: Layout) -> tuple[str, str]:
    """The method that a call is served by, and why.

    Raises:
        NotImplementedError: the method asked for by name does not serve the call.
    """
    asked, world_size = call.setting.method, call.setting.world_size
    refusal = ulysses.unserved(call, layout, world_size)
    if asked == "ulysses" and refusal:
        raise NotImplementedError(f"method 'ulysses' does not serve this call: {refusal}; use method='ring'")
    if asked != "auto":
        return asked, "asked for by name"
    if world_size == 1:
        return "ring", "one rank has everything"
    hops = sum(way.hops for way in layout.ways)
    if hops <= (world_size - 1) // 2:
        return "ring", f"keys that are seen are at most {hops} hops away, of {world_size - 1}"
    rows = layout.total_q // world_size
    work = rows * (call.q.shape[1] // max(call.k.shape[1], 1))
    if work >= HIDDEN:
        return "ring", f"{work} rows of a rank and heads share each key, {HIDDEN} or more: products hide the hops"
    short = f"only {work} rows of a rank and heads share each key, less than {HIDDEN}: hops would be waited for"
    if refusal is None:
        return "ulysses", f"{short}, and {call.q.shape[1]} heads divide among {world_size} ranks"
    each = call.k.shape[0] * call.k.shape[1] * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size()
    if each * layout.total_k > GATHERED:
        return "ring", f"{refusal}, and all keys together are more than {GATHERED >> 20} MB"
    return "all_gather", f"{short}, and {refusal}"


def met(links: Links, call: Call) -> list[list[int]]:
    """What each rank says (`Call.layout`), once all are known to make the same call."""
    own = [call.q.shape[2], call.k.shape[2], *call.rows()]
    if not call.setting.run_check:
        return [own] * links.world_size if call.setting.lengths is None else [list(x) for x in call.setting.lengths]
    return agree(links, call.q.device, call.alike(), own, None)


def of_one_seed(links: Links, call: Call) -> Call:
    """The call with the seed of dropout that the group's first rank drew."""
    if "seed" not in call.tensors:
        return call
    return call._replace(tensors=call.tensors | {"seed": links.first(call.tensors["seed"])})


def forward_impl(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Any, text: str) -> Any:
    call = unflatten(q, k, v, tensors, text)
    links = Links.named(call.setting.group)
    links.warm(q.device)
    said = met(links, call)
    layout = call.layout(said)
    method, _ = choose(call, layout)
    call = of_one_seed(links, call)
    if method == "ulysses":
        o, lse = ulysses.forward(links, call, layout)
    else:
        o, lse = ring_methods.forward(method, links, call, layout)
    return o, lse, torch.tensor(said, dtype=torch.int64)


def forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Any, text: str) -> Any:
    *_, setting = read(text)
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))
    return dense_like(q, v.shape[3]), lse, torch.empty(setting.world_size, 4, dtype=torch.int64, device="cpu")


def backward_impl(
    do: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    lse: torch.Tensor, said: torch.Tensor, tensors: Any, text: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    call = unflatten(q, k, v, tensors, text)
    links = Links.named(call.setting.group)
    layout = call.layout(said.tolist())
    method, _ = choose(call, layout)
    call, output = of_one_seed(links, call), Output(o, lse, do, dlse)
    if method == "ulysses":
        grads = ulysses.backward(links, call, layout, output, Gradients(*needs))
    else:
        grads = ring_methods.backward(method, links, call, layout, output, Gradients(*needs))
    return [x for x in grads if x is not None]


def backward_fake(
    do: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    lse: torch.Tensor, said: torch.Tensor, tensors: Any, text: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    inputs = (q, k, v, *(tensors[OPERANDS.index(name)] for name in DIFFERENTIABLE))
    return [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]


for name, impl, fake in (
    ("ring_forward", forward_impl, forward_fake),
    ("ring_backward", backward_impl, backward_fake),
):
    library.impl(name, impl, "CompositeExplicitAutograd")
    library.impl(name, guarded(getattr(torch.ops.flash, name)), "Autograd")
    torch.library.register_fake(f"flash::{name}", fake, lib=library)


def forward_flops(q: Any, k: Any, v: Any, tensors: Any, text: str, *_: Any, **__: Any) -> int:
    """Operations on a rank's rows and all keys, hidden or not, as if shards were alike."""
    return flops(q, k, text, q.shape[3] + v.shape[3])


def backward_flops(
    do: Any, dlse: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, said: Any, tensors: Any, text: str, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """The same of the backward pass."""
    return flops(q, k, text, 3 * q.shape[3] + 2 * v.shape[3])


def flops(q: Any, k: Any, text: str, widths: int) -> int:
    """Floating-point operations of as many products of each pair of a query and a key."""
    setting: Setting = read(text)[-1]
    return 2 * int(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]) * setting.world_size * widths


register_flop_formula(torch.ops.flash.ring_forward, get_raw=True)(forward_flops)
register_flop_formula(torch.ops.flash.ring_backward, get_raw=True)(backward_flops)


def mapped(info: Any, axes: Any, *args: Any) -> Any:
    """An op under torch.vmap."""
    raise NotImplementedError("ring_attention does not serve torch.vmap: make what is mapped part of the batch")


torch.library.register_vmap("flash::ring_forward", mapped, lib=library)
torch.library.register_vmap("flash::ring_backward", mapped, lib=library)


class RingAttention(torch.autograd.Function):
    """o and lse of (q, k, v, text, *tensors), differentiable once."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, text: str, *tensors: Any) -> Any:
        o, lse, said = torch.ops.flash.ring_forward(q, k, v, tensors, text)
        ctx.save_for_backward(q, k, v, o, lse, said, *tensors)
        ctx.text = text
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        q, k, v, o, lse, said, *tensors = ctx.saved_tensors
        places = [OPERANDS.index(name) for name in DIFFERENTIABLE]
        needs = [*ctx.needs_input_grad[:3], *(ctx.needs_input_grad[4 + at] for at in places)]
        if do is None:
            do = o.new_zeros(()).expand_as(o)
        found = iter(RingBackward.apply(do, dlse, q, k, v, o, lse, said, ctx.text, needs, *tensors))  # type: ignore[no-untyped-call]
        grads = [next(found) if need else None for need in needs]
        of_tensors: list[torch.Tensor | None] = [None] * len(tensors)
        for at, grad in zip(places, grads[3:], strict=True):
            of_tensors[at] = grad
        return *grads[:3], None, *of_tensors


class RingBackward(torch.autograd.Function):
    """The wanted gradients; they have no derivative of their own, and say so."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *saved, text, needs = inputs[:10]
        return tuple(torch.ops.flash.ring_backward(*saved, inputs[10:], text, needs))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("ring_attention is differentiable once: detach what the first derivative gives")


def attend(call: tuple[list[Any], str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """(o, lse) of this rank's rows: through autograd where an input asks for a gradient, by the raw op elsewhere."""
    tensors, text = call
    inputs = [q, k, v, *(x for x in tensors if x is not None)]
    if torch.compiler.is_compiling():
        q, k, v, *tensors = distinct([q, k, v, *tensors])
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return RingAttention.apply(q, k, v, text, *tensors)  # type: ignore[no-untyped-call]
    return torch.ops.flash.ring_forward(q, k, v, tensors, text)[:2]
