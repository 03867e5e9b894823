"""Who is measured in decoding: a function of bench.decode.Operands that returns o [batch, heads, 1, head_dim].

Each has the cache as it likes it best: [batch, heads, seqlen, head_dim] in memory, which those of other layouts read
through a transposed view; no peer's time contains a copy of the cache.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.peers import FLEX, OURS, SDPA, Attention, Peer, never, package_absent

if TYPE_CHECKING:
    from bench.decode import Operands

FA2_PAGE = 256  # flash_attn's kernel takes pages of a multiple of so many keys


@contextmanager
def ours(case: Case, device: torch.device) -> Iterator[Attention]:
    """flash.decode.flash_attention_decode with nothing chosen, as a user calls it."""
    from flash.decode import flash_attention_decode

    def attention(x: "Operands") -> torch.Tensor:
        o = flash_attention_decode(
            x.q, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens, block_table=x.block_table,
            k_scale=x.k_scale, v_scale=x.v_scale,
        )  # fmt: skip
        assert isinstance(o, torch.Tensor)
        return o

    yield attention


def dense_alone(what: str, case: Case) -> str | None:
    """The reason of peers that have no pages and no scales."""
    return None if case.cache == "dense" else f"{what} reads a cache that is dense and in the dtype of q alone"


def sdpa_absent(case: Case, device: torch.device) -> str | None:
    """The reason of SDPA."""
    return dense_alone("SDPA", case)


@contextmanager
def sdpa(case: Case, device: torch.device) -> Iterator[Attention]:
    """F.scaled_dot_product_attention: one query sees every key, no mask is needed."""

    def attention(x: "Operands") -> torch.Tensor:
        return F.scaled_dot_product_attention(x.q, x.k_cache, x.v_cache, enable_gqa=case.group > 1)

    yield attention


def flex_absent(case: Case, device: torch.device) -> str | None:
    """The reason of FlexAttention, whose kernel for few queries is for GPUs."""
    if device.type != "cuda":
        return f"FlexAttention's decoding is a GPU's; the device is {device.type}"
    return dense_alone("FlexAttention as it is timed here", case)


@contextmanager
def flex(case: Case, device: torch.device) -> Iterator[Attention]:
    """FlexAttention, compiled: it takes its decoding kernel by itself where queries are few."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention(x: "Operands") -> torch.Tensor:
        o = compiled(x.q, x.k_cache, x.v_cache, enable_gqa=case.group > 1)
        assert isinstance(o, torch.Tensor)
        return o

    try:
        yield attention
    finally:
        torch.compiler.reset()  # torch stops compiling a function after eight shapes


def kvcache_absent(module: str, pages_of: int | None, case: Case, device: torch.device) -> str | None:
    """The reason of a package's flash_attn_with_kvcache; its pages hold a multiple of pages_of keys, None = any."""
    if reason := package_absent(module)(case, device):
        return reason
    try:
        if not hasattr(import_module(module), "flash_attn_with_kvcache"):
            return f"{module} has no flash_attn_with_kvcache"
    except Exception as error:  # built for another torch, CUDA or GPU
        return f"{module} is not importable: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if case.cache == "fp8":
        return f"{module} has no float8 cache under another dtype of q"
    size = int(case.cache.partition(" ")[2] or 0)
    if size and pages_of is not None and size % pages_of:
        return f"{module} takes pages of a multiple of {pages_of} keys"
    return None


def kvcache(module: str, table: str) -> Callable[[Case, torch.device], AbstractContextManager[Attention]]:
    """A package's flash_attn_with_kvcache, which takes [batch, seqlen, heads, head_dim]; `table` names its table."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        function = import_module(module).flash_attn_with_kvcache

        def attention(x: "Operands") -> torch.Tensor:
            q, k, v = (y.transpose(1, 2) for y in (x.q, x.k_cache, x.v_cache))
            pages = {} if x.block_table is None else {table: x.block_table}
            returned = function(q, k, v, cache_seqlens=x.cache_seqlens, causal=True, **pages)
            o: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
            return o.transpose(1, 2)

        yield attention

    return prepare


def package(name: str, module: str, table: str, pages_of: int | None = None) -> Peer:
    """A package's function as a peer."""
    absent = partial(kvcache_absent, module, pages_of)
    return Peer(name, f"{module}.flash_attn_with_kvcache", absent, kvcache(module, table))


PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, "flash.decode.flash_attention_decode", never, ours),
        Peer(SDPA, "torch SDPA, its own choice of backend", sdpa_absent, sdpa),
        Peer(FLEX, "torch FlexAttention, compiled: its decoding kernel", flex_absent, flex),
        package("flash-attn-2", "flash_attn", "block_table", FA2_PAGE),
        package("flash-attn-3", "flash_attn_interface", "page_table"),
        package("flash-attn-4", "flash_attn.cute", "page_table"),
    )
}
