"""flash_attention in torch's registry of flash implementations: below all Python, for everything that calls torch's
attention on a CUDA device. Compiled and run on CPU tensors, not yet run on a GPU.

    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
    from flash.integrations import sdpa_registry

    sdpa_registry.register()
    activate_flash_attention_impl("flash-triton")     # scaled_dot_product_attention, varlen_attn: ours
    restore_flash_attention_impl()                    # torch's again

Above these operators torch chooses one by the call, in C++, and nobody but torch.nn.attention.sdpa_kernel changes that:

    flash       float16 and bfloat16, no mask; heads may be grouped
    efficient   masks, float32, large head dimensions; the gradient of a mask, which torch wants in its expanded shape
    math, cuDNN the rest, which never gets here: float64, grouped heads beside a mask, cuDNN where it comes first

`flash.integrations.sdpa` serves that too, and keeps a mask's gradient in the mask's own shape. Outputs have the shapes,
dtypes and strides that torch's fakes of these operators promise, so that torch.compile sees no difference. A seed of
dropout travels as torch's rng_state or philox_seed, so that a backward drops what its forward did.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import dispatch
from ..kernels.spec import Gradients
from ..problem import Problem

LSE_ALIGNMENT, BIAS_ALIGNMENT = 32, 16  # of the last axis, in elements; torch's efficient kernel writes whole tiles
OF_QKV = Gradients(True, True, True, False, False, False)

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def register(name: str = "flash-triton") -> None:
    """Make a name known to torch.nn.attention.activate_flash_attention_impl, which then calls `install`.

    Nothing changes before it is activated. torch.nn.attention.restore_flash_attention_impl takes it back.

    Args:
        name: what activate_flash_attention_impl is to be called with. Default: "flash-triton".

    Source: torch.nn.attention.register_flash_attention_impl, torch 2.13.
    """
    from torch.nn.attention import register_flash_attention_impl

    register_flash_attention_impl(name, register_fn=install)


@dataclass
class Handle:
    """What keeps our kernels in torch's dispatcher."""

    library: torch.library.Library | None

    def remove(self) -> None:
        """Give torch its own kernels back."""
        self.library = None  # a Library that nobody holds takes back what it registered


def install(device: str = "CUDA") -> Handle:
    """Put our kernels in the place of torch's.

    Args:
        device: the dispatch key. Default: "CUDA", AMD's devices included.

    Returns:
        A handle; torch's kernels are back when its remove is called, or it is dropped.
    """
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, kernel, device)
    return Handle(library)


def problem_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None, **keywords: Any
) -> Problem:
    """The Problem of a call whose dtypes autocast has already had its say on."""
    with dispatch.as_given(q):
        problem = Problem.of(q, k, v, **keywords)
    return problem if seed is None else replace(problem, mods=problem.mods._replace(seed=seed))


def drawn(q: torch.Tensor, dropout_p: float) -> torch.Tensor | None:
    """A seed of dropout, int64 [1] on q's device, from torch's generator; None without dropout."""
    return torch.randint(0, 2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None


def as_state(q: torch.Tensor, seed: torch.Tensor | None) -> Pair:
    """rng_state and what is unused beside it, as the flash operators return them."""
    if torch.version.hip:
        return as_scalars(q, seed)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    if seed is not None:
        state.view(torch.int64)[:1].copy_(seed)
    return state, torch.zeros((), dtype=torch.uint64, device=q.device)


def as_scalars(q: torch.Tensor, seed: torch.Tensor | None) -> Pair:
    """philox_seed and philox_offset, as the efficient operator returns them."""
    none = torch.zeros((), dtype=torch.int64, device=q.device)
    return (none if seed is None else seed.view(())), none.clone()


def seed_of(state: torch.Tensor, dropout_p: float) -> torch.Tensor | None:
    """The seed that `as_state` or `as_scalars` put away."""
    return state.view(-1).view(torch.int64)[:1] if dropout_p > 0 else None


def sdpa_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """_scaled_dot_product_flash_attention: [batch, heads, seqlen, head_dim], causal from the bottom right."""
    check_served(return_debug_mask)
    seed = drawn(query, dropout_p)
    problem = problem_of(query, key, value, seed, dropout_p=dropout_p, causal=is_causal, scale=scale)
    o, lse = dispatch.forward(problem)
    return o, lse, None, None, query.shape[2], key.shape[2], *as_state(query, seed), query.new_empty(0)


def sdpa_flash_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> Triple:
    """_scaled_dot_product_flash_attention_backward."""
    seed = seed_of(philox_seed, dropout_p)
    problem = problem_of(query, key, value, seed, dropout_p=dropout_p, causal=is_causal, scale=scale)
    found = dispatch.backward(problem, grad_out, None, out, logsumexp.contiguous(), OF_QKV)
    return found.q, found.k, found.v


def efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """_scaled_dot_product_efficient_attention: [batch, heads, seqlen, head_dim], causal from the top left."""
    seed = drawn(query, dropout_p)
    problem = efficient_problem(query, key, value, seed, attn_bias, dropout_p, is_causal, scale)
    o, lse = dispatch.forward(problem)
    if not compute_log_sumexp:
        lse = lse.new_empty(*lse.shape[:2], 0)
    elif not torch.version.hip:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=float("inf"))
    return seqlen_before_heads(o), lse, *as_scalars(query, seed)


def efficient_backward(
    grad_out_: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """_scaled_dot_product_efficient_attention_backward."""
    wanted = attn_bias is not None and grad_input_mask[3]
    seed, lse = seed_of(philox_seed, dropout_p), logsumexp[..., : query.shape[2]].contiguous()
    problem = efficient_problem(query, key, value, seed, attn_bias, dropout_p, is_causal, scale, narrow=not wanted)
    found = dispatch.backward(problem, grad_out_, None, out, lse, OF_QKV._replace(bias=wanted))
    of_qkv = (seqlen_before_heads(x) for x in found[:3])
    return *of_qkv, padded(found.bias.view(attn_bias.shape)) if wanted and attn_bias is not None else None


def efficient_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    narrow: bool = True,
) -> Problem:
    """The Problem of an efficient call; torch has expanded its bias, and where that shows it is taken back."""
    if bias is not None and narrow:
        for axis in range(bias.dim()):
            if bias.shape[axis] > 1 and bias.stride(axis) == 0:
                bias = bias.narrow(axis, 0, 1)
    return problem_of(q, k, v, seed, bias=bias, dropout_p=dropout_p, causal=causal, q_offset=0, scale=scale)


def seqlen_before_heads(x: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, seqlen, head_dim] in memory as [batch, seqlen, heads, head_dim], which torch's fakes promise."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(dbias: torch.Tensor) -> torch.Tensor:
    """dbias with rows that start at a multiple of BIAS_ALIGNMENT elements, likewise."""
    length = dbias.shape[-1]
    if length % BIAS_ALIGNMENT == 0:
        return dbias.contiguous()
    rows = dbias.new_empty(*dbias.shape[:-1], length + -length % BIAS_ALIGNMENT)
    return rows[..., :length].copy_(dbias)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """_flash_attention_forward: [batch, seqlen, heads, head_dim], or packed [total, heads, head_dim] with cum_seq_q and
    cum_seq_k, int32 [batch + 1]; causal from the bottom right. Keys are never split, whatever num_splits says."""
    check_served(return_debug_mask, block_table)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        for name, x in (("alibi_slopes", alibi_slopes), ("seqused_k", seqused_k)):
            if x is not None:  # torch's own kernels would go back without them, in silence
                raise NotImplementedError(f"{name} has no place in torch's backward; use flash_attention_varlen")
    seed = drawn(query, dropout_p)
    lengths, window = (cum_seq_q, cum_seq_k, max_q, max_k), (window_size_left, window_size_right)
    used = {} if seqused_k is None else only_the_first(seqused_k, query, cum_seq_q, max_k)
    keywords = dict(dropout_p=dropout_p, causal=is_causal, scale=scale, alibi_slopes=alibi_slopes, **used)
    problem = flash_problem(query, key, value, seed, lengths, window, **keywords)
    o, lse = dispatch.forward(problem)
    return (
        as_torchs(o, cum_seq_q),
        lse if cum_seq_q is None else lse.squeeze(0),
        *as_state(query, seed),
        query.new_empty(0),
    )


def flash_into(out: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
    """_flash_attention_forward_no_dropout_inplace: `flash` with o in a tensor that is there."""
    o, lse, *_ = flash(*args, **keywords)
    out.copy_(o)
    return lse


def flash_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Triple:
    """_flash_attention_backward."""
    seed, lengths = seed_of(rng_state, dropout_p), (cum_seq_q, cum_seq_k, max_q, max_k)
    window = window_size_left, window_size_right
    keywords = dict(dropout_p=dropout_p, causal=is_causal, scale=scale)
    problem = flash_problem(query, key, value, seed, lengths, window, **keywords)
    do, o = (as_ours(x, cum_seq_q) for x in (grad_out, out))
    lse = logsumexp.contiguous() if cum_seq_q is None else logsumexp.contiguous().unsqueeze(0)
    found = dispatch.backward(problem, do, None, o, lse, OF_QKV)
    return as_torchs(found.q, cum_seq_q), as_torchs(found.k, cum_seq_q), as_torchs(found.v, cum_seq_q)


def flash_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    lengths: tuple[torch.Tensor | None, torch.Tensor | None, int, int],
    window: tuple[int | None, int | None],
    **keywords: Any,
) -> Problem:
    """The Problem of a flash call, packed where lengths say so; -1 is a side of the window without limit."""
    left, right = (None if side is None or side < 0 else side for side in window)
    keywords["window"] = None if left is None and right is None else (left, right)
    starts_q, starts_k, *longest = lengths
    if starts_q is None and starts_k is None:
        return problem_of(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seed, **keywords)
    named = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True))
    return problem_of(q, k, v, seed, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **named, **keywords)


def only_the_first(
    seqused_k: torch.Tensor, query: torch.Tensor, starts_q: Any, longest: int
) -> dict[str, torch.Tensor]:
    """What leaves of each sequence's keys the first seqused_k [batch], and aligns the queries to the last of them."""
    lengths = query.shape[1] if starts_q is None else starts_q.diff()
    mask = torch.arange(longest, device=query.device) < seqused_k[:, None]
    return {"mask": mask[:, None, None], "q_offset": seqused_k - lengths}


def as_ours(x: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """[batch, heads, seqlen, head_dim] of [batch, seqlen, heads, head_dim] or [total, heads, head_dim]."""
    return x.transpose(1, 2) if starts is None else x.transpose(0, 1).unsqueeze(0)


def as_torchs(x: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """What `as_ours` was made of."""
    return x.transpose(1, 2) if starts is None else x.squeeze(0).transpose(0, 1)


def check_served(return_debug_mask: bool, block_table: torch.Tensor | None = None) -> None:
    """Raise where a call asks for what there is none of."""
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask is not served: attention weights are never written down")
    if block_table is not None:
        raise NotImplementedError("block_table is not served: gather the pages, and call with cum_seq_k and seqused_k")


KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": sdpa_flash,
    "_scaled_dot_product_flash_attention_backward": sdpa_flash_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_flash_attention_forward": flash,
    "_flash_attention_forward_no_dropout_inplace": flash_into,
    "_flash_attention_backward": flash_backward,
}
