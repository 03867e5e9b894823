"""What the queries of a Hugging Face model may see, as a tensor that transformers carries from a model to its layers.

A model asks for its mask once, by lengths, offsets, padding and a function of positions; its layers get the answer, if
it has four axes, as it is, or cut to some of its queries. It is one of two:

    int64    [batch, 1, seqlen_q, seqlen_k]: the number of a Visibility, which is kept here, and of the query; one
             number a query in memory, expanded, and beside it at most one a key
    bool     [batch, 1, seqlen_q, seqlen_k], who sees whom: what a Visibility cannot say (chunks, image blocks), static
             caches that are not full, whose masks transformers writes out, and what torch.compile traces

It is never None, which would leave to the layer's own word whether it is causal and how wide its window is: Informer's
decoder says that it is not causal, and Qwen2-MoE's layers do not pass on their windows.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

KEPT = 64  # what masks of so many say is kept: more than the forwards whose backward is still to come have
ROWS = 2**32  # a Visibility's number times this, and the query's, make a number of a mask

_kept: "OrderedDict[int, Visibility]" = OrderedDict()
_numbers = count(1)
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> first and last number of its queries


@dataclass(frozen=True)
class Visibility:
    """What queries see: of the keys those up to their own place, or all, as far as `left`, and not hidden.

    The last query stands at the last key. shown is bool [batch, keys], documents int64 [batch, keys]; whole: a mask was
    given, so that there are no documents.
    """

    causal: bool
    left: int | None
    rows: int
    keys: int
    shown: Tensor | None = None
    documents: Tensor | None = None
    whole: bool = False

    def mask(self, device: Any) -> Tensor:
        """The tensor that stands for it, int64 [batch, 1, rows, keys]."""
        number = next(_numbers)
        _kept[number] = self
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        held = next((x for x in (self.shown, self.documents) if x is not None), None)
        rows = torch.arange(number * ROWS, number * ROWS + self.rows, device=device)
        return rows[:, None].expand(1 if held is None else held.shape[0], 1, self.rows, self.keys)

    @classmethod
    def of(cls, mask: Tensor, batch: int, rows: int, keys: int) -> "tuple[Visibility, int]":
        """What a mask stands for, and the first of its queries; it must be one for `rows` queries and `keys` keys.

        A mask of one key says the same of all, as it does by broadcasting elsewhere.

        Raises:
            ValueError: it is not one that `mask` made, or was cut so that nobody knows which keys it is of.
        """
        found = _read.get(mask)
        if found is None and mask.dtype == torch.int64 and mask.numel() > 0:
            found = _read[mask] = mask[0, 0, [0, -1], 0].tolist()  # waits for the device, once a forward
        first, last = found or (0, 0)
        number, row = divmod(first, ROWS)
        said = _kept.get(number)
        if said is None or last - first != mask.shape[2] - 1:
            raise ValueError(
                f"attention_mask must be bool or float, or of a forward that is not long ago, got {mask.dtype} of "
                f"shape {list(mask.shape)}"
            )
        if not said.causal and said.left is None and said.shown is None and said.documents is None:  # of any lengths
            return cls(False, None, rows, keys, whole=True), 0
        held = next((len(x) for x in (said.shown, said.documents) if x is not None), 1)
        if mask.shape[2] != rows or mask.shape[3] != said.keys or held not in (1, batch):
            raise ValueError(
                f"attention_mask must broadcast to {[batch, 1, rows, keys]}, got shape {list(mask.shape)}, cut from "
                f"{said.rows} queries and {said.keys} keys"
            )
        if said.keys == 1 < keys and said.documents is None:
            return cls(False, None, rows, keys, said.shown, None, True), row
        if said.keys != keys:
            raise ValueError(f"attention_mask must be of {keys} keys, got {said.keys}")
        return said, row


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

    if is_tracing():
        return None
    documents = None
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        documents = packed_documents(mask_function)
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
    if keys != kv_length or ((causal or local_size is not None) and keys - q_length != q_offset - kv_offset):
        return None
    left = None if local_size is None else local_size - 1 if causal else local_size

    shown = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if shown is not None:
        shown = shown[:, kv_offset : kv_offset + keys]
        if is_tracing(shown):
            return None
        if bool(shown.all()):
            return Visibility(causal, left, q_length, keys, whole=True)
    return Visibility(causal, left, q_length, keys, shown, documents)


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
