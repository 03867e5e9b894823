"""The raw ops of decoding, `flash::append` and `flash::decode`: what they take, their fakes, their guard.

`append` declares that it writes to the caches; `decode` writes to nothing. Both are opaque to torch.compile and have no
derivative: as those of `flash/ops.py`, they raise wherever one would be dropped. Floating-point operations are counted
over the keys that sequences have, where that can be read, and over what a cache holds elsewhere.
"""

import ast
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import dispatch_step
from .kernels.spec import Cache, Config, Mods, Positions, Rotary, Spec, dense_like
from .ops import guarded, library, watching
from .step import Step

REST = "Tensor cache_seqlens, Tensor? table, Tensor? slots, Tensor? leftpad, Tensor? k_scale, Tensor? v_scale"
ROTARY = "Tensor? cos, Tensor? sin, bool interleaved"

library.define(
    f"append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, {REST}, {ROTARY}, str backend) -> ()"
)
library.define(
    f"decode(Tensor q, Tensor k_cache, Tensor v_cache, {REST}, {ROTARY}, Tensor? alibi_slopes, Tensor? sinks, "
    "SymInt new, float scale, SymInt[] positions, str spec, int num_splits, bool batch_invariant, str backend, "
    "int[] config) -> (Tensor o, Tensor lse)"
)

ABOUT = len(Cache._fields) - 2  # of a cache beside k and v
ORDINARY = (torch.Tensor, torch.nn.Parameter)


@lru_cache(maxsize=1024)
def spec_of(text: str) -> Spec:
    """The Spec that crossed an op's boundary as text."""
    return Spec(*ast.literal_eval(text))


def rotary_of(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool) -> Rotary | None:
    """The rotary embedding that crossed an op's boundary in parts."""
    return None if cos is None else Rotary(cos, sin, interleaved)


def step_of(q: torch.Tensor, *call: Any) -> Step:
    """The Step that `attend` took apart, its append done."""
    cache, rest = Cache(*call[: 2 + ABOUT]), call[2 + ABOUT :]
    cos, sin, interleaved, slopes, sinks, new, scale, positions, spec, splits, invariant, backend, numbers = rest
    return Step(
        q, cache, None, None, new, rotary_of(cos, sin, interleaved), Mods(alibi_slopes=slopes, sinks=sinks),
        spec_of(spec), scale, Positions(*positions), splits, invariant, backend,
        Config._make((*numbers[:-1], bool(numbers[-1]))) if numbers else None,
    )  # fmt: skip


def attend(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Step, new keys appended first; by the ops where anything but the values may be asked for."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not watching() and is_plain(step):
        if step.k is not None and step.v is not None:
            dispatch_step.append(step.k, step.v, step.cache, step.rotary, step.backend)
            written(step.cache.k, step.cache.v)
        return dispatch_step.decode(step)
    k_cache, v_cache, *rest = step.cache
    rotary = step.rotary or (None, None, False)
    q = step.q
    if compiling and forward_ad._current_level >= 0:
        q = torch.ops.flash.lost(q)  # while it compiles: later there would be an append before it
    if step.k is not None:
        torch.ops.flash.append(k_cache, v_cache, step.k, step.v, *rest, *rotary, step.backend)
    return torch.ops.flash.decode(  # type: ignore[no-any-return]
        q, k_cache, v_cache, *rest, *rotary, step.mods.alibi_slopes, step.mods.sinks, step.new, step.scale,
        list(step.positions), str(tuple(step.spec)), step.num_splits, step.batch_invariant, step.backend,
        [int(number) for number in step.config or ()],
    )  # fmt: skip


def is_plain(step: Step) -> bool:
    """Whether the tensors are torch's own, as they lie in memory; that none asks for a derivative is known."""
    tensors = (step.q, step.k, step.v, *step.cache, *(step.rotary or ())[:2], step.mods.alibi_slopes, step.mods.sinks)
    return all(x is None or (type(x) in ORDINARY and not x.is_neg()) for x in tensors)


def written(*tensors: torch.Tensor) -> None:
    """Tell autograd that tensors are not what they were; those of inference mode have nobody to tell."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def append_impl(k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *call: Any) -> None:
    *rest, cos, sin, interleaved, backend = call
    dispatch_step.append(k, v, Cache(k_cache, v_cache, *rest), rotary_of(cos, sin, interleaved), backend)


def append_fake(*args: Any) -> None:
    """Nothing comes back."""


def append_guarded(*args: Any) -> None:
    """The append at the Autograd key."""
    guarded(torch.ops.flash.append)(*args)
    written(*args[:2])


def decode_impl(q: torch.Tensor, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return dispatch_step.decode(step_of(q, *call))


def decode_fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return dense_like(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def batched(*args: Any) -> Any:
    """An op's kernel under vmap: torch's own would run it once for each element, on one cache."""
    raise NotImplementedError(
        "flash_attention_decode does not serve torch.vmap: its batch is the first axis of q, with a length and a slot "
        "of the cache for each sequence"
    )


for name, impl, fake, guard in (
    ("append", append_impl, append_fake, append_guarded),
    ("decode", decode_impl, decode_fake, guarded(torch.ops.flash.decode)),
):
    library.impl(name, impl, "CompositeExplicitAutograd")
    library.impl(name, guard, "Autograd")
    library.impl(name, batched, "Batched")
    library.impl(name, batched, "FuncTorchBatched")
    torch.library.register_fake(f"flash::{name}", fake, lib=library)


@register_flop_formula(torch.ops.flash.decode, get_raw=True)
def decode_flops(
    q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, table: Any, slots: Any, leftpad: Any, k_scale: Any,
    v_scale: Any, cos: Any, sin: Any, interleaved: Any, alibi_slopes: Any, sinks: Any, new: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, heads, seqlen_q, head_dim = q.shape
    capacity = k_cache.shape[2] * (1 if table is None else table.shape[1])
    if cache_seqlens.device.type == "meta" or isinstance(cache_seqlens, FakeTensor):
        keys = batch * capacity
    else:
        keys = int((cache_seqlens.long() + new).clamp(0, capacity).sum())
    return 2 * heads * seqlen_q * keys * (head_dim + v_cache.shape[3])  # type: ignore[no-any-return]
