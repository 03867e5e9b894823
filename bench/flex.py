"""FlexAttention, told of a case by functions of two indices, as its users write them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from bench.cases import Case, visible
from bench.features import document_ids, filled, find, slopes

Closure = Callable[..., torch.Tensor]

COMPILED_MASKS = 16384  # keys from which a BlockMask is made without a bool for each pair


def flex_absent(case: Case, device: torch.device) -> str | None:
    """FlexAttention counts where it is compiled, and has a backward where one is timed."""
    if case.traits.dropout_p:
        return "FlexAttention has no dropout"
    if device.type == "cuda" or case.series in ("long", "error", "cold"):
        return None
    return "compiled FlexAttention has no backward on a CPU, and eager FlexAttention materialises the scores"


def flex_mask(case: Case, device: torch.device) -> Closure | None:
    """The case's visibility as FlexAttention's mask_mod; None where all see all."""
    name, feature, size = find(case.feature)
    offset, last = case.seqlen_k - case.seqlen_q, filled(case.seqlen_k)
    ids = document_ids(case.seqlen_k, size).to(device) if name in ("document", "varlen") else None
    dense = visible(case, range(case.seqlen_q), range(case.seqlen_k), device) if name == "mask" else None

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i + offset

    def window(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i + offset) & (j > i + offset - size)

    def padding(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j < last

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return dense[i, j]  # type: ignore[index]

    def document(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ids[i] == ids[j]  # type: ignore[index]

    def pattern(b: Any, h: Any, i: Any, j: Any) -> Any:
        return feature.visible(i, j, size)  # type: ignore[misc]

    own: dict[str, Closure] = {
        "window": window, "padding": padding, "mask": mask, "document": document, "varlen": document,
        "block mask": pattern,
    }  # fmt: skip
    found = own.get(name)
    if not case.causal:
        return found
    if found is None or name == "window":
        return found or causal

    def both(b: Any, h: Any, i: Any, j: Any) -> Any:
        return found(b, h, i, j) & causal(b, h, i, j)

    return both


def flex_score(case: Case, device: torch.device, operand: Any = None) -> Closure | None:
    """The case's change of the score as FlexAttention's score_mod; None where there is none."""
    cap, offset = case.traits.softcap or math.inf, case.seqlen_k - case.seqlen_q
    steep: Any = slopes(case.heads).to(device) if case.traits.slopes else None

    def softcap(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return cap * torch.tanh(s / cap)

    def alibi(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s - steep[h] * (i + offset - j).abs()

    def key_bias(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + operand[b, 0, 0, j]

    def bias(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + operand[0, h, i, j]

    name = find(case.feature)[0].removesuffix(" gradient")
    own: dict[str, Closure] = {"softcap": softcap, "alibi": alibi, "key bias": key_bias, "bias": bias}
    return own.get(name)


def flex_blocks(case: Case, device: torch.device) -> Any:
    """The case's visibility as a BlockMask; None where all see all."""
    from torch.nn.attention.flex_attention import create_block_mask

    if (mask := flex_mask(case, device)) is None:
        return None
    whole = case.seqlen_k < COMPILED_MASKS or device.type == "cpu"
    make = create_block_mask if whole else torch.compile(create_block_mask)
    return make(mask, None, None, case.seqlen_q, case.seqlen_k, device=device.type)


@contextmanager
def flex(case: Case, device: torch.device) -> Iterator[Closure]:
    """FlexAttention, compiled, with a BlockMask where something is hidden; sinks by its lse, as transformers has it."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    told: dict[str, Any] = {"block_mask": flex_blocks(case, device), "enable_gqa": case.group > 1}
    sinks = case.traits.operand == "sinks"
    score_of = cache(partial(flex_score, case, device))  # one function for a bias, as a model has it

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *operand: torch.Tensor) -> torch.Tensor:
        if device.type == "cpu" and not torch.is_grad_enabled():
            q, k, v = q.detach(), k.detach(), v.detach()  # it refuses what requires grad there, whatever the mode
        if sinks:
            o, aux = compiled(q, k, v, return_aux=AuxRequest(lse=True), **told)
            o = o * torch.sigmoid(aux.lse - operand[0][:, None])[..., None].to(o.dtype)
        else:
            o = compiled(q, k, v, score_mod=score_of(*operand), **told)
        assert isinstance(o, torch.Tensor)
        return o

    try:
        yield attention
    finally:
        torch.compiler.reset()  # torch stops compiling a function after eight shapes
