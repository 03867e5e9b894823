"""torch's scaled_dot_product_attention, served by flash_attention: called by name, or for everybody in a scope.

    from flash.integrations import sdpa

    o = sdpa.scaled_dot_product_attention(query, key, value, is_causal=True)

    with sdpa.patch():      # every torch.nn.functional.scaled_dot_product_attention inside, also under torch.compile
        loss = model(x).loss
        loss.backward()

What calls another function is not reached by `patch`, and keeps torch's attention:

    torch.nn.MultiheadAttention with need_weights=True, its default      multiplies and exponentiates by itself
    the same, and TransformerEncoderLayer, in eval mode without grad     one fused operator; it calls the function after
                                                                         torch.backends.mha.set_fastpath_enabled(False)
    code that imported the function itself, by `from ... import`         holds torch's, whatever the name says now

`flash.integrations.sdpa_registry` reaches below all of torch's Python, and serves fewer calls.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ..attention import flash_attention

LOCK = threading.Lock()
REPLACED: list[Any] = []  # what each open scope found in torch; the first is torch's own


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with its arguments and its meaning, by flash_attention.

        o = softmax(scale * query @ key.mT + attn_mask) @ value

    Neither heads nor masks are repeated in memory, whatever broadcasts; a float mask's gradient has the mask's own
    shape. A query that sees no key has o = 0. Two things are ours: a float mask hides a key by -inf, and by the lowest
    number of its dtype too; and dropout draws other weights than torch's does from the same seed.

    Args:
        query: [..., heads, seqlen_q, head_dim], of two dimensions ([seqlen_q, head_dim]) or more, float16, bfloat16,
            float32 or float64; any strides. A jagged nested tensor [batch, heads, *, head_dim] takes no attn_mask.
        key: [..., heads, seqlen_k, head_dim], of query's dtype and device. All axes before the last two broadcast.
        value: [..., heads, seqlen_k, head_dim_v], likewise.
        attn_mask: what broadcasts to [..., heads, seqlen_q, seqlen_k]: bool, True where the query sees the key, or any
            float dtype, added to the score and differentiable. Default: none.
        dropout_p: probability, in [0, 1), that an attention weight is dropped, in training or not. Default: 0.0.
        is_causal: query i sees key j where j <= i: from the top left, unlike causal in flash_attention where the
            lengths differ. Not beside attn_mask. Default: False.
        scale: factor of the product, any finite float. Default: head_dim ** -0.5.
        enable_gqa: key and value may have fewer heads than query, in number a divisor of query's. Default: False.

    Returns:
        [..., heads, seqlen_q, head_dim_v], of query's dtype, dense in query's axis order in memory.

    Raises:
        ValueError: an argument is wrong, or both attn_mask and is_causal are given.
        NotImplementedError: what flash_attention does not serve; key and value differ in heads, both more than one.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if attn_mask is not None and is_causal:
        raise ValueError("explicit attn_mask should not be set when is_causal=True")
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(x, torch.Tensor) and (x is not None or name != "attn_mask"):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool or float, got {attn_mask.dtype}; attn_mask.bool() is True = attend")
    call: dict[str, Any] = dict(scale=scale, dropout_p=dropout_p, causal=is_causal)
    if query.is_nested:
        if attn_mask is not None:
            raise NotImplementedError(
                "attn_mask beside nested tensors is not served; use flash_attention's mask or bias"
            )
        check_heads(query.shape[-3], key.shape[-3], enable_gqa)
        return attend(query, key, value, None, call if not is_causal else {**call, "q_offset": 0})
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got shape {list(x.shape)}")
    if is_causal and query.shape[-2] != key.shape[-2]:
        call["q_offset"] = 0
    rank = max(query.dim(), key.dim(), value.dim())
    if not query.dim() == key.dim() == value.dim() == 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        query, key, value = broadcast(query, key, value, enable_gqa)
    if attn_mask is not None and attn_mask.dim() < query.dim():
        attn_mask = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
    o = attend(query, key, value, attn_mask, call)
    return o if o.dim() == rank else o[(0,) * (o.dim() - rank)]


def broadcast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views with four axes or more, alike but for lengths, head dimensions and heads, of which key and value have fewer
    where one is shared."""
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError("enable_gqa must be False where an input has no axis of heads, got True")
    rank = max(4, query.dim(), key.dim(), value.dim())
    query, key, value = (x[(None,) * (rank - x.dim())] for x in (query, key, value))
    heads_k, heads_v = key.shape[-3], value.shape[-3]
    if heads_k != heads_v and 1 not in (heads_k, heads_v):
        if enable_gqa:
            raise NotImplementedError(
                f"key and value with {heads_k} and {heads_v} heads are not served; repeat the fewer"
            )
        raise ValueError(f"value must have {heads_k} heads like key, or one, got {heads_v}")
    heads = query.shape[-3]
    check_heads(heads, max(heads_k, heads_v), enable_gqa)
    if heads == 1 and not enable_gqa:
        heads = max(heads_k, heads_v)
    shapes = [x.shape[:-3] for x in (query, key, value)]
    try:
        batch = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"query, key and value must have axes before heads that broadcast, got {got}") from None
    sizes = heads, max(heads_k, heads_v), max(heads_k, heads_v)
    found = [x.expand(*batch, n, *x.shape[-2:]) for x, n in zip((query, key, value), sizes, strict=True)]
    return found[0], found[1], found[2]


def check_heads(heads: int, heads_k: int, enable_gqa: bool) -> None:
    """Check that torch would take these numbers of heads."""
    if not enable_gqa and heads != heads_k and 1 not in (heads, heads_k):
        raise ValueError(
            f"key and value must have {heads} heads like query where enable_gqa is False, or one, got {heads_k}"
        )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, call: Any
) -> torch.Tensor:
    """flash_attention on four axes or more: what lies before heads is one axis of batch where that is a view."""
    if query.dim() == 4:
        if attn_mask is not None:
            call = {**call, "mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
        return flash_attention(query, key, value, **call)  # type: ignore[return-value]  # a pair with return_lse alone
    sizes, tensors = query.shape[:2], [query, key, value]
    if attn_mask is not None and 0 not in sizes:
        if any(n not in (1, size) for n, size in zip(attn_mask.shape, sizes, strict=False)):
            shape = [*query.shape[:-1], key.shape[-2]]
            raise ValueError(f"attn_mask must broadcast to {shape}, got shape {list(attn_mask.shape)}")
        tensors.append(attn_mask)
    if all(is_one_axis(x, sizes) for x in tensors):
        query, key, value, *rest = (x.flatten(0, 1) for x in tensors)
        o = attend(query, key, value, rest[0] if rest else None, call)
        return o.view(*sizes, *o.shape[1:])
    slices = []
    for i in range(sizes[0]):
        query, key, value, *rest = (x[i if x.shape[0] > 1 else 0] for x in tensors)
        slices.append(attend(query, key, value, rest[0] if rest else None, call))
    return torch.stack(slices)


def is_one_axis(x: torch.Tensor, sizes: torch.Size) -> bool:
    """Whether the first two axes of x, which broadcast to these sizes, are one without a copy."""
    outer, inner = x.shape[:2]
    if (outer, inner) != tuple(sizes) and (outer, inner) != (1, 1):
        return False
    return x.numel() == 0 or 1 in (outer, inner) or x.stride(0) == inner * x.stride(1)


@contextmanager
def patch() -> Iterator[None]:
    """Serve every call of torch.nn.functional.scaled_dot_product_attention while the scope is open.

    Inside, the name in torch.nn.functional is ours; afterwards it is again what it was before, also where the scope is
    left by an exception. It is one name for the whole process: calls of all threads are served, those of autograd's
    (activation checkpoints) among them. Scopes nest and, in several threads, overlap: torch has its own back when all
    are closed. What torch.compile traces inside is served, and compiled again for outside; open the scope around
    compiled functions, not in them. A call that cannot be served raises, as ours by name does.

    Source: the same name is what torch.nn.functional.multi_head_attention_forward, transformers and timm look up.
    """
    with LOCK:
        REPLACED.append(F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        with LOCK:
            F.scaled_dot_product_attention = REPLACED.pop()
