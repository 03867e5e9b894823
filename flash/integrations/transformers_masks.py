"""What the queries of a Hugging Face model may see, as a tensor that transformers carries from a model to its layers.

A model asks for its mask once, by lengths, offsets, padding and a function of positions; its layers get the answer, if
it has four axes, as it is. It is one of two:

    integers    the compact form: bounds, and at most one number for each key; never one for each pair
    bool        [batch, 1, seqlen_q, seqlen_k], who sees whom: what the compact form cannot say (chunks, image blocks),
                steps of a static cache, and compiled calls without a mask, which might be packed

The compact form is expanded over axes whose lengths are what it says, so that it occupies a byte, or a number a key:

    [batch, 1 or 2, 1 or 2 + left, keys]    1: both directions, 2: causal    1: no window, 2 + left: a window
    int8     nothing is hidden              int16    nor is it by the mask that was given
    uint8    1 where a key is visible       int64    the document of a key, of packed sequences

keys are those that are filled, of a static cache the first ones; the last query stands at the last of them. It is never
None, which would leave to the layer's own word whether it is causal and how wide its window is: Informer's decoder says
that it is not causal, and Qwen2-MoE's layers do not pass on their windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What queries see: of the first `keys` keys those up to their own place, or all, as far as `left`, and not hidden.

    shown is bool [batch, keys], documents int64 [batch, keys]; whole: a mask was given, so that there are no documents.
    """

    causal: bool
    left: int | None
    keys: int
    shown: Tensor | None = None
    documents: Tensor | None = None
    whole: bool = False

    def mask(self, device: Any) -> Tensor:
        """The compact form, [batch, 1 or 2, 1 or 2 + left, keys]."""
        if self.shown is not None:
            held = self.shown.to(torch.uint8)
        elif self.documents is not None:
            held = self.documents.to(torch.int64)
        else:
            held = torch.zeros(1, 1, dtype=torch.int16 if self.whole else torch.int8, device=device)
        shape = held.shape[0], 1 + self.causal, 1 if self.left is None else 2 + self.left, self.keys
        return held[:, None, None].expand(shape)

    @classmethod
    def of(cls, mask: Tensor) -> "Visibility":
        """What a compact form says."""
        _, causal, window, keys = mask.shape
        row, dtype = mask[:, 0, 0], mask.dtype
        return cls(
            causal == 2,
            None if window == 1 else window - 2,
            keys,
            row.view(torch.bool) if dtype == torch.uint8 else None,
            row if dtype == torch.int64 else None,
            dtype == torch.int16,
        )


def visibility(
    q_length: int,
    kv_length: int,
    *,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **others: Any,
) -> Visibility | None:
    """What transformers asks a mask for, in the compact form; None of what that form cannot say.

    transformers allows to skip a plain mask, causal or not, with a window (local_size) or without; a packed one is told
    by its function. Anything else has a function that only it understands.
    """
    from transformers.masking_utils import prepare_padding_mask
    from transformers.utils.import_utils import is_tracing

    documents = None
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        documents = None if is_tracing() else packed_documents(mask_function)
        if documents is None:
            return None
    causal = not allow_is_bidirectional_skip
    if isinstance(q_offset, Tensor):  # that of a static cache
        if q_length == 1 or is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    if local_size is not None and kv_offset + kv_length <= local_size:
        local_size = None
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        return None  # chunks, not a window
    keys = min(q_offset + q_length - kv_offset, kv_length) if causal else kv_length
    if (causal or local_size is not None) and keys - q_length != q_offset - kv_offset:
        return None
    left = None if local_size is None else local_size - 1 if causal else local_size

    shown = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if shown is not None:
        shown = shown[:, kv_offset : kv_offset + keys]
        if not is_tracing(shown) and bool(shown.all()):
            return Visibility(causal, left, keys, whole=True)
    return Visibility(causal, left, keys, shown, documents)


def pairs(q_length: int, kv_length: int, device: Any, request: dict[str, Any]) -> Tensor:
    """Who sees whom, bool [batch, 1, q_length, kv_length]."""
    from transformers.masking_utils import sdpa_mask

    request = {**request, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(q_length=q_length, kv_length=kv_length, device=device, **request)
    return mask


def packed_documents(mask_function: Callable[..., Tensor]) -> Tensor | None:
    """The documents [batch, seqlen] of transformers' packed mask function, causal or with a window; None of another."""
    inner = held_by(mask_function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    if len(inner) != 2:
        return None
    documents: Tensor | None = held_by(inner[0], "packed_sequence_mask_function.<locals>.inner_mask").get(
        "packed_sequence_mask"
    )
    positions = held_by(inner[1], "remap_positions_for_packed_sequence.<locals>.inner_mask")
    within = positions.get("mask_function")
    if getattr(within, "__qualname__", None) != "causal_mask_function":
        overlay, *rest = held_by(within, "and_masks.<locals>.and_mask").get("mask_functions", (None,))
        if not held_by(overlay, "sliding_window_overlay.<locals>.inner_mask") or len(rest) != 1:
            return None
        if getattr(rest[0], "__qualname__", None) != "causal_mask_function":
            return None
    return documents


def held_by(function: Any, qualname: str) -> dict[str, Any]:
    """What a nested function of this name refers to; nothing of another function."""
    if getattr(function, "__qualname__", None) != qualname:
        return {}
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
