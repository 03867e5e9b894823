"""Step -> implementation, with reasons: which backend serves a call of decoding, and with which tiles and splits.

    triton   kernels/append.py and kernels/decode.py     GPUs, and CPU tensors under Triton's interpreter
    torch    flash/gathered.py                           everything; reads lengths on the host

Both halves of a call, the append and the attention, are asked with the same device, dtypes and widths, and so go the
same way.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from . import gathered
from .autotune import decoding, tables
from .checks import name_of
from .dispatch import as_given, refusal, target_of
from .kernels.spec import Cache, Config, Rotary
from .step import Step

formula = lru_cache(maxsize=1024)(decoding.for_decode)

if TYPE_CHECKING:
    from .kernels.launch import Launched


def refuses(backend: str, device: torch.device, dtype: torch.dtype, cache: Cache) -> str | None:
    """Why a backend does not decode queries of a dtype with a cache, or None where it does."""
    if backend == "hopper":
        return "decoding has no Hopper kernels"
    if backend == "torch":
        return None
    return refusal(backend, device, dtype, max(cache.k.shape[3], cache.v.shape[3]))


def chosen(backend: str, device: torch.device, dtype: torch.dtype, cache: Cache) -> str:
    """The backend that serves a call of decoding, and its append.

    Raises:
        NotImplementedError: the backend asked for by name does not serve it.
    """
    if backend == "auto":
        # the interpreter is for tests: CPU tensors go there only when asked
        order = ("torch",) if device.type == "cpu" else ("triton", "torch")
        return next(name for name in order if refuses(name, device, dtype, cache) is None)
    if reason := refuses(backend, device, dtype, cache):
        raise NotImplementedError(
            f"backend {backend!r} does not decode {name_of(dtype)} queries with a {name_of(cache.k.dtype)} cache of "
            f"head_dim {cache.k.shape[3]} on {device}: {reason}; use backend='auto', which takes "
            f"{chosen('auto', device, dtype, cache)!r}"
        )
    return backend


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at once, one each; the interpreter runs one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def append(k: torch.Tensor, v: torch.Tensor, cache: Cache, rotary: Rotary | None, backend: str) -> "Launched | None":
    """Write new keys and values into a cache, by the backend that serves it; what was launched, if anything."""
    if chosen(backend, k.device, k.dtype, cache) == "torch":
        with as_given(k):
            gathered.append(k, v, cache, rotary)
        return None
    from .kernels import append as kernels

    return kernels.append(k, v, cache, rotary)


def decode(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Step whose new keys are in the cache, from the backend that serves it."""
    s = step
    if chosen(s.backend, s.q.device, s.q.dtype, s.cache) == "torch":
        with as_given(s.q):
            return gathered.decode(s.q, s.cache, s.new, s.rotary, s.mods, s.spec, s.scale, s.positions)
    (o, lse, *_), _ = launched_decode(s)
    return o, lse


def launched_decode(step: Step) -> "tuple[list[torch.Tensor], list[Launched]]":
    """o, lse and what else Triton's kernels allocated for a Step whose new keys are in the cache; and the launches."""
    from .kernels import decode as kernels

    s, config = step, tuned(step).config
    call = (s.q, s.cache, s.new, s.rotary, s.mods, s.spec, s.scale, s.positions)
    splits, keys = parts_of(s, config)
    return kernels.decode(*call, splits, config, keys)


def tuned(step: Step) -> tables.Choice:
    """The Config of the decode kernel, the user's or a formula's, and why."""
    if step.config is not None:
        return tables.Choice(step.config, "given by the caller")
    q, k, v = step.q, step.cache.k, step.cache.v
    head_dim, paged = max(q.shape[3], v.shape[3]), step.cache.table is not None
    return formula(target_of(q.device), name_of(q.dtype), head_dim, rows_of(step), k.element_size(), paged)


def rows_of(step: Step) -> int:
    """Rows that share a key head: query heads of a group, times queries."""
    heads, heads_k = step.q.shape[1], step.cache.k.shape[1]
    return int(heads // max(1, heads_k) * step.q.shape[2])


def parts_of(step: Step, config: Config) -> tuple[int, int]:
    """How many parts a sequence's keys are cut into at most, and the keys of each; 0 for equal ones.

    What the user asks, or what fills the GPU. A table is as wide as the longest sequence beside needs, so that
    batch-invariant parts are of a fixed size, and their number alone depends on the table.
    """
    k, table = step.cache.k, step.cache.table
    capacity = int(k.shape[2] * (1 if table is None else table.shape[1]))
    if step.num_splits == 1:
        return 1, 0
    if step.num_splits:  # more than tiles would be empty
        return max(2, min(step.num_splits, -(-capacity // config.block_n))), 0
    row_tiles = -(-rows_of(step) // config.block_m)
    if step.batch_invariant:  # longer ones for more rows: what the parts take of memory does not grow with both
        keys = decoding.INVARIANT << max(0, row_tiles - 1).bit_length()
        return max(1, -(-capacity // keys)), keys
    device, batch = step.q.device, step.q.shape[0]
    return decoding.splits_of(capacity, batch, k.shape[1], row_tiles, multiprocessors(device), config.block_n), 0
