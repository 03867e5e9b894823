"""Who is measured: each way of computing attention, or the reason it is absent.

A peer is data. `absent` says why it cannot serve a case before anything runs; `prepare` makes what users make once
(masks, compiled functions, the choice of a backend) outside the timing and yields a function of q, k, v and of the
feature's operand, if it has one. Each is told of a feature as its users do: a keyword, a mask in memory, a function.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import Case, reach, visible
from bench.features import document_ids, document_starts, find, slopes
from bench.flex import flex, flex_absent, flex_mask

Attention = Callable[..., torch.Tensor]  # of q, k, v and the feature's operand

STANDARD = "standard"
OURS = "flash"
PLAIN, HOPPER = "flash-triton", "flash-hopper"  # ours by one backend: what "flash" chooses between
SDPA = "sdpa"
FLEX = "flex"
TUTORIAL = "tutorial"


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Args:
        name: what tables and pictures call it.
        what: one line saying what runs, with the module it comes from.
        absent: (case, device) -> the reason it cannot run, None when it can.
        prepare: (case, device) -> context manager that yields the attention function.
    """

    name: str
    what: str
    absent: Callable[[Case, torch.device], str | None]
    prepare: Callable[[Case, torch.device], AbstractContextManager[Attention]]


def never(case: Case, device: torch.device) -> str | None:
    """The reason of a peer that is always there."""
    return None


def standard_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, the scores in memory; `hidden` broadcasts to them, True where masked."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # Scaling q costs one pass over n * d numbers instead of n * n: the baseline is not made slower than it has to be.
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].to(s.dtype).expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1)
    p = p if sinks is None else p[..., :-1]
    return (p if drop is None else drop(p)) @ v


def seen(case: Case, device: torch.device) -> torch.Tensor | None:
    """bool, broadcastable to [seqlen_q, seqlen_k], True where a query sees a key; None where all see all."""
    found = reach(case)
    if found is not None and bool((found[0] == found[0][0]).all() and (found[1] == found[1][0]).all()):
        everything = int(found[1][0] - found[0][0]) == case.seqlen_k
        return None if everything else visible(case, range(1), range(case.seqlen_k), device)
    return visible(case, range(case.seqlen_q), range(case.seqlen_k), device)


def distances(case: Case, device: torch.device) -> torch.Tensor | None:
    """ALiBi as a bias [1, heads, seqlen_q, seqlen_k] in the case's dtype; None where the case has no slopes."""
    if not case.traits.slopes:
        return None
    i = torch.arange(case.seqlen_q, device=device)[:, None] + (case.seqlen_k - case.seqlen_q)
    apart = (i - torch.arange(case.seqlen_k, device=device)).abs()
    return (-slopes(case.heads).to(device)[:, None, None] * apart)[None].to(getattr(torch, case.dtype))


@contextmanager
def standard(case: Case, device: torch.device) -> Iterator[Attention]:
    """Standard attention; masks are made once, as models that register them as buffers do."""
    feature, mask, bias = case.traits, seen(case, device), distances(case, device)
    hidden = None if mask is None else ~mask
    drop = partial(F.dropout, p=feature.dropout_p) if feature.dropout_p else None

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *operand: torch.Tensor) -> torch.Tensor:
        terms: dict[str, Any] = {"bias": bias} | dict(zip([feature.operand], operand, strict=False))
        return standard_attention(q, k, v, hidden, softcap=feature.softcap, drop=drop, **terms)

    yield attention


def sdpa_absent(case: Case, device: torch.device) -> str | None:
    """The reason of features that SDPA has no argument for."""
    name = find(case.feature)[0]
    return f"SDPA has no {name}, and no mask says it" if name in ("softcap", "sinks") else None


def sdpa(backend: str | None) -> Callable[[Case, torch.device], AbstractContextManager[Attention]]:
    """F.scaled_dot_product_attention held to one backend, or left to choose; a feature is a mask in memory."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right

        square = case.seqlen_q == case.seqlen_k
        only_causal = case.causal and not case.feature
        mask: Any = distances(case, device)
        if only_causal and not square:
            mask = causal_lower_right(case.seqlen_q, case.seqlen_k)
        elif not only_causal and mask is None:
            mask = seen(case, device)
        told: dict[str, Any] = {
            "is_causal": only_causal and square,
            "enable_gqa": case.group > 1,
            "dropout_p": case.traits.dropout_p,
        }

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *operand: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=operand[0] if operand else mask, **told)

        # Entered once, so that the timing holds no context manager.
        held = nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend))
        with held, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield attention

    return prepare


def cuda_only(case: Case, device: torch.device) -> str | None:
    """The reason of SDPA backends that exist for CUDA alone."""
    return None if device.type == "cuda" else f"PyTorch has this backend for CUDA only; the device is {device.type}"


def cuda_sdpa_absent(case: Case, device: torch.device) -> str | None:
    """The reason of SDPA backends for CUDA: the device, or the feature."""
    return cuda_only(case, device) or sdpa_absent(case, device)


def package_absent(module: str) -> Callable[[Case, torch.device], str | None]:
    """The reason of a peer that is a package of its own, for CUDA."""

    def absent(case: Case, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{module} is for CUDA only; the device is {device.type}"
        if case.feature:
            return f"{module} is timed without features alone"
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package is missing
            found = False
        return None if found else f"{module} is not installed"

    return absent


def flash_attn(module: str) -> Callable[[Case, torch.device], AbstractContextManager[Attention]]:
    """Dao-AILab's flash_attn_func, which takes [batch, seqlen, heads, head_dim]: a transposed view is enough."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        from importlib import import_module

        function = import_module(module).flash_attn_func

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            returned = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=case.causal)
            o: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
            return o.transpose(1, 2)

        yield attention

    return prepare


def our_keywords(case: Case, device: torch.device) -> dict[str, Any]:
    """The feature in flash_attention's keywords, its operand excepted."""
    name, feature, size = find(case.feature)
    if name == "window":
        return {"window": (size - 1, 0)}
    if name == "padding":
        return {"mask": seen(case, device)[None, None].expand(case.batch, 1, 1, -1).contiguous()}  # type: ignore[index]
    if name == "mask":
        return {"mask": seen(case, device)[None, None]}  # type: ignore[index]
    if name == "document":
        from flash.mods import document

        return {"mask_mod": document(document_ids(case.seqlen_k, size).to(device))}
    if name == "block mask":
        from torch.nn.attention.flex_attention import create_block_mask

        mask = flex_mask(replace(case, causal=False), device)
        assert mask is not None
        return {"block_mask": create_block_mask(mask, None, None, case.seqlen_q, case.seqlen_k, device=device.type)}
    terms = {
        "alibi_slopes": slopes(case.heads).to(device) if feature.slopes else None,
        "softcap": feature.softcap,
        "dropout_p": feature.dropout_p,
    }
    return {keyword: term for keyword, term in terms.items() if term is not None}


def our_packed(case: Case, device: torch.device) -> Attention:
    """flash_attention_varlen on the documents of every row; views of q, k and v, whose tokens lie in that order."""
    from flash.attention import flash_attention_varlen

    starts = torch.tensor(document_starts(case.seqlen_k, case.size), dtype=torch.int32)
    longest = int(starts.diff().max())
    rows = torch.arange(case.batch, dtype=torch.int32)[:, None] * case.seqlen_k + starts[:-1]
    cu_seqlens = F.pad(rows.flatten(), (0, 1), value=case.batch * case.seqlen_k).to(device)
    told: dict[str, Any] = {f"cu_seqlens_{x}": cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        o = flash_attention_varlen(*packed, causal=case.causal, **told)
        assert isinstance(o, torch.Tensor)
        return o.view(case.batch, case.seqlen_q, *o.shape[1:]).transpose(1, 2)

    return attention


def ours(backend: str = "auto") -> Callable[[Case, torch.device], AbstractContextManager[Attention]]:
    """flash.attention.flash_attention with nothing but causal and the feature chosen, as a user calls it."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        from flash.attention import flash_attention

        if case.traits.packed:
            yield our_packed(case, device)
            return
        keywords, name = our_keywords(case, device), case.traits.operand

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *operand: torch.Tensor) -> torch.Tensor:
            given: dict[str, Any] = {name: operand[0]} if operand else {}
            o = flash_attention(q, k, v, causal=case.causal, backend=backend, **keywords, **given)
            assert isinstance(o, torch.Tensor)
            return o

        yield attention

    return prepare


def our_info(case: Case, device: torch.device, backend: str) -> dict[str, Any]:
    """flash.info of a case's call: the backend that would run, and with which tiles.

    Raises:
        NotImplementedError: the backend does not serve it.
    """
    from flash.dispatch import info

    dtype = getattr(torch, case.dtype)
    q = torch.empty(case.batch, case.heads, case.seqlen_q, case.head_dim, dtype=dtype, device=device)
    k = torch.empty(case.batch, case.heads_k, case.seqlen_k, case.head_dim, dtype=dtype, device=device)
    v = torch.empty(case.batch, case.heads_k, case.seqlen_k, case.head_dim_v, dtype=dtype, device=device)
    return info(q, k, v, causal=case.causal, backend=backend)


def our_backend_absent(backend: str) -> Callable[[Case, torch.device], str | None]:
    """The reason that flash itself gives where a backend asked for by name does not serve a case."""

    def absent(case: Case, device: torch.device) -> str | None:
        if case.feature:
            return f"backend {backend!r} is timed without features alone"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "there is no GPU to ask"
        try:
            our_info(case, device, backend)
        except NotImplementedError as error:
            return str(error).split("; use ")[0]
        return None

    return absent


def tutorial_absent(case: Case, device: torch.device) -> str | None:
    """The reason of shapes, devices and features that the tutorial's kernels do not have."""
    if device.type != "cuda":
        return f"the tutorial's kernels are for GPUs; the device is {device.type}"
    if case.feature:
        return "the tutorial is timed without features alone"
    if find_spec("triton") is None:
        return "triton is not installed"
    from bench.tutorial import refusal

    return refusal(case.heads, case.heads_k, case.seqlen_q, case.seqlen_k, case.head_dim, case.head_dim_v)


@contextmanager
def tutorial(case: Case, device: torch.device) -> Iterator[Attention]:
    """bench.tutorial.attention."""
    from bench.tutorial import attention

    yield partial(attention, causal=case.causal)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(STANDARD, "softmax(q k^T) v with the scores in memory, differentiated by autograd", never, standard),
        Peer(OURS, "flash.attention.flash_attention", never, ours()),
        Peer(PLAIN, "the same, backend='triton'", our_backend_absent("triton"), ours("triton")),
        Peer(HOPPER, "the same, backend='hopper'", our_backend_absent("hopper"), ours("hopper")),
        Peer(TUTORIAL, "Triton's tutorial 06, written anew in bench/tutorial.py", tutorial_absent, tutorial),
        Peer(SDPA, "torch SDPA, its own choice of backend", sdpa_absent, sdpa(None)),
        Peer("sdpa-flash", "torch SDPA, FLASH_ATTENTION", sdpa_absent, sdpa("FLASH_ATTENTION")),
        Peer("sdpa-efficient", "torch SDPA, EFFICIENT_ATTENTION", cuda_sdpa_absent, sdpa("EFFICIENT_ATTENTION")),
        Peer("sdpa-cudnn", "torch SDPA, CUDNN_ATTENTION", cuda_sdpa_absent, sdpa("CUDNN_ATTENTION")),
        Peer("sdpa-math", "torch SDPA, MATH", sdpa_absent, sdpa("MATH")),
        Peer(FLEX, "torch FlexAttention, compiled", flex_absent, flex),
        Peer("flash-attn-2", "flash_attn.flash_attn_func", package_absent("flash_attn"), flash_attn("flash_attn")),
        Peer("flash-attn-3", "flash_attn_interface.flash_attn_func",
             package_absent("flash_attn_interface"), flash_attn("flash_attn_interface")),
        Peer("flash-attn-4", "flash_attn.cute.flash_attn_func",
             package_absent("flash_attn.cute"), flash_attn("flash_attn.cute")),
    )
}  # fmt: skip


FEATURE_PEERS = (STANDARD, OURS, SDPA, FLEX)  # of the suites of features; the others time SDPA backend by backend
RACE_ONLY = (PLAIN, HOPPER, TUTORIAL)  # timed by the speed suite alone
OURS_ALL = (OURS, PLAIN, HOPPER)


def refusal(error: BaseException) -> str | None:
    """Why a backend turned a case down when called, None where the error is something else."""
    text = str(error)
    # SDPA held to one backend raises these where that backend does not take the shape.
    refused = "No available kernel" in text or "No viable backend" in text
    if "FlexAttention does not support backward on CPU" in text:
        return "compiled FlexAttention has no backward on a CPU"
    if type(error) is NotImplementedError and text.startswith(
        "backend "
    ):  # a pass that a backend of ours does not have
        return text.split("; use ")[0]
    return "this SDPA backend does not take the shape" if refused else None
