"""The functions of the flash-attn package, version 2, by flash_attention: an import is all that changes.

    from flash.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func      # was: from flash_attn import

Parameters, their order and their defaults are FlashAttention-2's, and so is the meaning: tensors are [batch, seqlen,
heads, head_dim], causal and windows are aligned to the last key, a side of -1 is a window without limit, a softcap of
0.0 is none. What FlashAttention-2 refuses is served: float32 and float64, dropout beside softcap, head_dim of any size
up to 512 without padding, head_dim of v that differs, any strides, an empty batch, machines without a GPU.
flash_attn_with_kvcache is in `flash_attn_kvcache.py`.

softmax_lse is +inf, as there, where a query sees no key. It is differentiable, which theirs is not, and beside causal
and alibi_slopes it is that of the scores as they are documented: theirs is slope * (i + seqlen_k - seqlen_q) more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attention import flash_attention, flash_attention_varlen
from .flash_attn_arguments import check_axes, closed, keywords_of
from .flash_attn_kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
]  # fmt: skip

Returned = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]

COLUMNS = 512  # keys whose weights are found at once: the largest head_dim
ROUNDED = 128  # S_dmask's axes are multiples of it


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """flash_attn.flash_attn_func: exact attention of q to k and v.

        s_ij = softcap(softmax_scale * q_i . k_j) - slope * |i + seqlen_k - seqlen_q - j|        o = softmax(s) v

    Args:
        q: [batch, seqlen_q, heads, head_dim], float16, bfloat16, float32 or float64; any strides, never copied.
        k: [batch, seqlen_k, heads_k, head_dim], of q's dtype and device; heads_k divides heads, and is not repeated.
        v: [batch, seqlen_k, heads_k, head_dim_v], likewise.
        dropout_p: probability, in [0, 1), that an attention weight is dropped; 0.0 in evaluation. Default: 0.0.
        softmax_scale: factor of q.k. Default: head_dim ** -0.5.
        causal: key j is visible to query i when j <= i + seqlen_k - seqlen_q. Default: False.
        window_size: (left, right): and when -left <= j - (i + seqlen_k - seqlen_q) <= right; a negative side has no
            limit. Default: (-1, -1), no window.
        softcap: a score s becomes softcap * tanh(s / softcap) where it is above 0. Default: 0.0, none.
        alibi_slopes: [heads] or [batch, heads], float32 (any float). Differentiable. Default: none.
        deterministic: True keeps to kernels that repeat bit for bit. Default: False, unless torch's own switch is on.
        return_attn_probs: also return softmax_lse and S_dmask, for tests. Default: False.

    Returns:
        out [batch, seqlen_q, heads, head_dim_v], of q's dtype; with return_attn_probs (out, softmax_lse, S_dmask).
        softmax_lse is [batch, heads, seqlen_q], natural logarithm, float32 (float64 for float64), +inf where a query
        sees no key. S_dmask is empty without dropout; with it the weights before dropout, in memory for once, negative
        where they were dropped: [batch, heads, seqlen_q, seqlen_k] of q's dtype, both lengths filled with zeros up to a
        multiple of 128. FlashAttention-2 leaves rows of them unscaled; these are scaled.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: what flash_attention does not serve.

    Source: Dao 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691; flash_attn/flash_attn_interface.py.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, "[batch, seqlen, heads, head_dim]")
    keywords = keywords_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    keywords["deterministic"] = True if deterministic else None
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weigh(columns: torch.Tensor, p: float) -> torch.Tensor:
        one_hot = torch.arange(k.shape[2], device=k.device)[:, None] == columns
        return flash_attention(q, k, one_hot.to(k.dtype).expand(*k.shape[:3], -1), dropout_p=p, **keywords)  # type: ignore[return-value]

    weights = q.new_empty(0)
    if return_attn_probs and dropout_p > 0:
        weights = weights_of(weigh, q, k.shape[2], dropout_p)
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[3] % ROUNDED, 0, -weights.shape[2] % ROUNDED))
    o, lse = flash_attention(q, k, v, dropout_p=dropout_p, return_lse=True, **keywords)
    o = o.transpose(1, 2)
    return (o, closed(lse), weights) if return_attn_probs else o


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """flash_attn.flash_attn_kvpacked_func: flash_attn_func of k, v = kv[:, :, 0], kv[:, :, 1], which are views.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        kv: [batch, seqlen_k, 2, heads_k, head_dim]. Its gradient is of one piece too.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            flash_attn_func.

    Returns:
        As flash_attn_func.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: what flash_attention does not serve.

    Source: flash_attn/flash_attn_interface.py.
    """
    check_axes("kv", kv, "[batch, seqlen, 2, heads, head_dim]")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """flash_attn.flash_attn_qkvpacked_func: flash_attn_func of q, k, v = qkv.unbind(2), which are views.

    Args:
        qkv: [batch, seqlen, 3, heads, head_dim]. Its gradient is of one piece too.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            flash_attn_func.

    Returns:
        As flash_attn_func.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: what flash_attention does not serve.

    Source: flash_attn/flash_attn_interface.py.
    """
    check_axes("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Returned:
    """flash_attn.flash_attn_varlen_func: flash_attn_func of sequences that lie one after the other.

    Args:
        q: [total_q, heads, head_dim].
        k: [total_k, heads_k, head_dim].
        v: [total_k, heads_k, head_dim_v].
        cu_seqlens_q: int32 [batch + 1]: the queries of sequence b are cu_seqlens_q[b] up to cu_seqlens_q[b + 1].
        cu_seqlens_k: int32 [batch + 1], likewise for the keys.
        max_seqlen_q: length of the longest sequence of queries.
        max_seqlen_k: likewise for the keys.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            flash_attn_func, for each sequence.
        block_table: keys in pages are not served. Default: none.

    Returns:
        out [total_q, heads, head_dim_v]; with return_attn_probs (out, softmax_lse [heads, total_q], S_dmask [batch,
        heads, max_seqlen_q, max_seqlen_k]), as from flash_attn_func.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: block_table is given, or what flash_attention_varlen does not serve.

    Source: flash_attn/flash_attn_interface.py.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, "[total, heads, head_dim]")
    if block_table is not None:
        raise NotImplementedError("block_table is not served: gather the pages of k and v, and pass cu_seqlens_k")
    keywords = keywords_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    keywords["deterministic"] = True if deterministic else None
    longest_q, longest_k = int(max_seqlen_q), int(max_seqlen_k)
    lengths: dict[str, Any] = dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k
    )

    def weigh(columns: torch.Tensor, p: float) -> torch.Tensor:
        one_hot = places(cu_seqlens_k, len(k))[1][:, None, None] == columns
        values = one_hot.to(k.dtype).expand(*k.shape[:2], -1)
        return flash_attention_varlen(q, k, values, dropout_p=p, **lengths, **keywords)  # type: ignore[return-value]

    weights = q.new_empty(0)
    if return_attn_probs and dropout_p > 0:
        sizes = (n + -n % ROUNDED for n in (longest_q, longest_k))
        weights = by_sequence(weights_of(weigh, q, longest_k, dropout_p), cu_seqlens_q, *sizes)
    o, lse = flash_attention_varlen(q, k, v, dropout_p=dropout_p, return_lse=True, **lengths, **keywords)
    return (o, closed(lse), weights) if return_attn_probs else o


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """flash_attn.flash_attn_varlen_kvpacked_func: flash_attn_varlen_func of k, v = kv[:, 0], kv[:, 1], which are views.

    Args:
        q: [total_q, heads, head_dim].
        kv: [total_k, 2, heads_k, head_dim]. Its gradient is of one piece too.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in flash_attn_varlen_func.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            flash_attn_func.

    Returns:
        As flash_attn_varlen_func.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: what flash_attention_varlen does not serve.

    Source: flash_attn/flash_attn_interface.py.
    """
    check_axes("kv", kv, "[total, 2, heads, head_dim]")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """flash_attn.flash_attn_varlen_qkvpacked_func: flash_attn_varlen_func of q, k, v = qkv.unbind(1), which are views.

    Args:
        qkv: [total, 3, heads, head_dim]. Its gradient is of one piece too.
        cu_seqlens: int32 [batch + 1]: sequence b is cu_seqlens[b] up to cu_seqlens[b + 1].
        max_seqlen: length of the longest sequence.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            flash_attn_func.

    Returns:
        As flash_attn_varlen_func.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: what flash_attention_varlen does not serve.

    Source: flash_attn/flash_attn_interface.py.
    """
    check_axes("qkv", qkv, "[total, 3, heads, head_dim]")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@torch.no_grad()
def weights_of(
    weigh: Callable[[torch.Tensor, float], torch.Tensor], q: torch.Tensor, seqlen_k: int, dropout_p: float
) -> torch.Tensor:
    """The weights that the next call drops, negative, and the others: o where v is the unit matrix, [..., seqlen_k].

    weigh finds them for some keys; torch's generator is left as it was, so that the next call draws the same seed.
    """
    parts = []
    for start in range(0, seqlen_k, COLUMNS):
        columns = torch.arange(start, min(start + COLUMNS, seqlen_k), device=q.device)
        with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
            kept = weigh(columns, dropout_p)
        weights = weigh(columns, 0.0)
        parts.append(torch.where(kept > 0, weights, -weights))
    return torch.cat(parts, -1) if parts else q.new_empty(*q.shape[:-1], 0)


def places(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each packed row [total] its sequence, and its position there."""
    rows = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    return sequence, rows - cu_seqlens[sequence]


def by_sequence(weights: torch.Tensor, cu_seqlens_q: torch.Tensor, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """Packed weights [total_q, heads, keys] as [batch, heads, seqlen_q, seqlen_k], zeros where there is nothing."""
    _, heads, keys = weights.shape
    total = int(cu_seqlens_q[-1])
    found = weights.new_zeros(len(cu_seqlens_q) - 1, seqlen_q, heads, seqlen_k)
    found[..., :keys][places(cu_seqlens_q, total)] = weights[:total]
    return found.transpose(1, 2)
