"""A plain call made before is made again at once: what checks, tables and Triton said of it is kept as a Plan.

A plan is found by all that it depends on: shapes, strides, dtype, device and the few options that a plain call has; its
tensors are 16-byte aligned. A call that is new only in its lengths, batch, heads or strides, as with keys that grow in
number, gets the plan of one that is compiled alike. What is anything else, or comes where torch watches, takes the
ordinary way: gradients, transforms, modes, autocast, tracing, subclasses of Tensor. The result is the same to the bit.
"""

from operator import attrgetter
from typing import Any

import torch

from . import dispatch
from .autotune import tables
from .checks import MAX_SEQLEN
from .kernels.spec import Unfit, dense_like
from .ops import watching
from .problem import Problem

SERVED = attrgetter("is_cuda")  # where launching costs: elsewhere no kernel is compiled
TRITONS = ((3, 6), (3, 9))  # first and last whose launch is known
MOST = 4096  # plans kept; then all are forgotten
ALIGNED = 16  # bytes, or elements of a stride: what Triton compiles other code for
WIDE = 2**31  # and from here on strides have 64 bits
HALVES = (torch.float16, torch.bfloat16)  # of others a setting of torch's makes another kernel
NEW: Any = object()

plans: dict[tuple[Any, ...], Any] = {}  # by the call; None where it takes the ordinary way
kinds: dict[tuple[Any, ...], Any] = {}  # by what is compiled for it


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None, softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """(o, lse) of a plain call by its plan, made where there is none yet; None where the ordinary way must be taken.

    Args:
        q, k, v: of four axes; checked only where the plan is made.
        causal, scale, softcap, backend: as in `flash.attention.flash_attention`.
    """
    if watched(q, k, v) or not (causal is True or causal is False) or type(backend) is not str:
        return None
    if not (scale is None or type(scale) is float) or not (softcap is None or type(softcap) is float):
        return None  # 1 == True == 1.0, and not all of them are right
    try:
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNED:
            return None
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.get_device(),
            k.get_device(), v.get_device(), causal, scale, softcap, backend,
        )  # fmt: skip
    except RuntimeError:  # sparse or nested: they have no address or no strides
        return None
    plan = plans.get(key, NEW)
    if plan is None:
        return None
    if plan is NEW:
        if q.dtype not in HALVES or q.dim() != 4:
            return None
        kind = kind_of(q, k, v, key[6:])
        if kind not in kinds:
            return planned(key, kind, Problem.of(q, k, v, causal=causal, scale=scale, softcap=softcap, backend=backend))
        plan = keep(key, kinds[kind].like(q, k, v))
    o = dense_like(q, plan.head_dim_v)
    lse = torch.empty_strided(*plan.rows, dtype=torch.float32, device=plan.device)
    if (o.data_ptr() | lse.data_ptr()) % ALIGNED or not plan.launch(q, k, v, o, lse):
        return None
    return o, lse


def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a call's tensors or torch's state ask for more than the output's values."""
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is torch.Tensor) or not SERVED(q):
        return True
    if q.is_neg() or k.is_neg() or v.is_neg():
        return True
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return watching()


def kind_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What decides which kernel a call is compiled to and with which tiles; None of one that may be wrong or empty."""
    if k.dim() != 4 or v.dim() != 4:
        return None
    (batch, heads, seqlen_q, head_dim), (_, heads_k, seqlen_k, head_dim_v) = q.shape, v.shape
    alike = k.shape == (batch, heads_k, seqlen_k, head_dim) and v.shape[0] == batch
    if not alike or 0 in q.shape or 0 in v.shape or heads % heads_k or max(seqlen_q, seqlen_k) > MAX_SEQLEN:
        return None
    o = dense_like(q, head_dim_v, "meta")
    strides = [(n == 1, n % ALIGNED == 0, n >= WIDE) for x in (q, k, v, o) for n in x.stride()]
    bucket = tables.length_bucket(max(seqlen_q, seqlen_k))
    return head_dim, head_dim_v, heads // heads_k, bucket, *strides, *rest


def planned(
    key: tuple[Any, ...], kind: tuple[Any, ...] | None, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(o, lse) of a Problem without mods, its plan kept; None where the plain kernels do not serve it."""
    p, release = problem, dispatch.triton_release()
    if isinstance(release, str) or not TRITONS[0] <= release <= TRITONS[1] or dispatch.chosen(p) != "triton":
        keep(key, None)
        return None
    from .kernels.forward import planned_forward

    config = dispatch.tuned(p, "forward").config
    try:
        o, lse, plan = planned_forward(p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions, config)
    except Unfit:  # the ordinary way knows what to do
        keep(key, None)
        return None
    aligned = all(x.data_ptr() % ALIGNED == 0 for x in (p.q, p.k, p.v, o, lse))
    if plan is not None and aligned:
        keep(key, plan)
        if kind is not None:
            kinds[kind] = plan
    return o, lse


def keep(key: tuple[Any, ...], plan: Any) -> Any:
    """The plan, remembered."""
    if len(plans) >= MOST:
        plans.clear()
    plans[key] = plan
    return plan
