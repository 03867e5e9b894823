"""Who is measured: each way of computing attention, or the reason it is absent.

A peer is data. `absent` says why it cannot serve a case before anything runs; `prepare` makes what users make once
(masks, compiled functions, the choice of a backend) outside the timing and yields a function of q, k, v.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F

from bench.cases import Case

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

STANDARD = "standard"
OURS = "flash"


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


def standard_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, the scores in memory; `hidden` [seqlen_q, seqlen_k] is True where masked."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # Scaling q costs one pass over n * d numbers instead of n * n: the baseline is not made slower than it has to be.
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))
    return torch.softmax(s, -1) @ v


def causal_hidden(case: Case, device: torch.device) -> torch.Tensor | None:
    """[seqlen_q, seqlen_k] bool, True above the causal diagonal; None for a full case."""
    if not case.causal:
        return None
    return torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device).triu_(
        case.seqlen_k - case.seqlen_q + 1
    )


@contextmanager
def standard(case: Case, device: torch.device) -> Iterator[Attention]:
    """Standard attention; the causal mask is made once, as models that register it as a buffer do."""
    hidden = causal_hidden(case, device)
    yield lambda q, k, v: standard_attention(q, k, v, hidden)


def sdpa(backend: str) -> Callable[[Case, torch.device], AbstractContextManager[Attention]]:
    """F.scaled_dot_product_attention held to one backend."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right

        square = case.seqlen_q == case.seqlen_k
        mask = causal_lower_right(case.seqlen_q, case.seqlen_k) if case.causal and not square else None

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=case.causal and square, enable_gqa=case.group > 1
            )

        # Entered once, so that the timing holds no context manager.
        with sdpa_kernel(getattr(SDPBackend, backend)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield attention

    return prepare


def cuda_only(case: Case, device: torch.device) -> str | None:
    """The reason of SDPA backends that exist for CUDA alone."""
    return None if device.type == "cuda" else f"PyTorch has this backend for CUDA only; the device is {device.type}"


def flex_absent(case: Case, device: torch.device) -> str | None:
    """FlexAttention counts where it is compiled and has a backward."""
    if device.type == "cuda":
        return None
    return "compiled FlexAttention has no backward on a CPU, and eager FlexAttention materialises the scores"


@contextmanager
def flex(case: Case, device: torch.device) -> Iterator[Attention]:
    """FlexAttention, compiled, with a BlockMask where the case is causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offset = case.seqlen_k - case.seqlen_q

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return j <= i + offset

    block_mask = None
    if case.causal:
        block_mask = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o = compiled(q, k, v, block_mask=block_mask, enable_gqa=case.group > 1)
        return o[0] if isinstance(o, tuple) else o  # a tuple only where lse is asked for

    try:
        yield attention
    finally:
        torch.compiler.reset()  # torch stops compiling a function after eight shapes


def package_absent(module: str) -> Callable[[Case, torch.device], str | None]:
    """The reason of a peer that is a package of its own, for CUDA."""

    def absent(case: Case, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{module} is for CUDA only; the device is {device.type}"
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


@contextmanager
def ours(case: Case, device: torch.device) -> Iterator[Attention]:
    """flash.attention.flash_attention with nothing but causal chosen, as a user calls it."""
    from flash.attention import flash_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, flash_attention(q, k, v, causal=case.causal))

    yield attention


PEERS = {
    peer.name: peer
    for peer in (
        Peer(STANDARD, "softmax(q k^T) v with the scores in memory, differentiated by autograd", never, standard),
        Peer(OURS, "flash.attention.flash_attention", never, ours),
        Peer("sdpa-flash", "torch SDPA, FLASH_ATTENTION", never, sdpa("FLASH_ATTENTION")),
        Peer("sdpa-efficient", "torch SDPA, EFFICIENT_ATTENTION", cuda_only, sdpa("EFFICIENT_ATTENTION")),
        Peer("sdpa-cudnn", "torch SDPA, CUDNN_ATTENTION", cuda_only, sdpa("CUDNN_ATTENTION")),
        Peer("sdpa-math", "torch SDPA, MATH", never, sdpa("MATH")),
        Peer("flex", "torch FlexAttention, compiled", flex_absent, flex),
        Peer("flash-attn-2", "flash_attn.flash_attn_func", package_absent("flash_attn"), flash_attn("flash_attn")),
        Peer("flash-attn-3", "flash_attn_interface.flash_attn_func",
             package_absent("flash_attn_interface"), flash_attn("flash_attn_interface")),
        Peer("flash-attn-4", "flash_attn.cute.flash_attn_func",
             package_absent("flash_attn.cute"), flash_attn("flash_attn.cute")),
    )
}  # fmt: skip


def refusal(error: BaseException) -> str | None:
    """Why a backend turned a case down when called, None where the error is something else."""
    text = str(error)
    # SDPA held to one backend raises these where that backend does not take the shape.
    refused = "No available kernel" in text or "No viable backend" in text
    return "this SDPA backend does not take the shape" if refused else None
