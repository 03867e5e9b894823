"""Calls of decoding as data: three sequences in a cache, and features that change the call, each by itself or together.

Sequence 0 has 5 keys, sequence 1 none, sequence 2 as many as fit beside what is new. Nobody may see what a cache holds
elsewhere, which is NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flash import reference_cache
from flash.kernels.spec import Cache
from flash.step import Step, rotary_of

BATCH, HEADS, HEADS_K, HEAD_DIM, HEAD_DIM_V = 3, 4, 2, 8, 6
SLOTS, CAPACITY, NEW = 5, 24, 3
LENGTHS = (5, 0, 19)


class Case(NamedTuple):
    """The arguments of `flash_attention_decode`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    options: dict[str, Any]

    def oracle(self) -> reference_cache.Decoded:
        """What should come of it; the caches are left alone."""
        return reference_cache.decode(self.q, self.k_cache, self.v_cache, **self.options)

    def run(self, attend: Any, **keywords: Any) -> reference_cache.Decoded:
        """What comes of it, by a function with the public call's arguments; the caches are left alone."""
        caches = [x.clone(memory_format=torch.preserve_format) for x in (self.k_cache, self.v_cache)]
        o, lse = attend(self.q, *caches, return_lse=True, **self.options, **keywords)
        return reference_cache.Decoded(o, lse, *caches)


def step_of(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> Step:
    """The Step of a call of `flash_attention_decode`."""
    named = {"table": "block_table", "slots": "cache_batch_idx", "leftpad": "cache_leftpad"}
    named |= {name: name for name in ("k_scale", "v_scale")}
    seqlens = options.pop("cache_seqlens")
    cache = Cache(k_cache, v_cache, seqlens, **{field: options.pop(name, None) for field, name in named.items()})
    turn = [options.pop(name, None) for name in ("rotary_cos", "rotary_sin")]
    rotary = rotary_of(*turn, options.pop("rotary_interleaved", False))
    return Step.of(q, cache, rotary=rotary, **options)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def quarter_turns(positions: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of turns by multiples of a right angle, which any dtype rotates by exactly."""
    turns = torch.randint(0, 4, (positions, pairs))
    return torch.tensor([1.0, 0.0, -1.0, 0.0])[turns], torch.tensor([0.0, 1.0, 0.0, -1.0])[turns]


def options_of(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The keywords that a feature of that name brings."""
    rows = (BATCH, HEADS_K, NEW)
    return {
        "append": lambda: dict(k=draw(*rows, HEAD_DIM, dtype=dtype), v=draw(*rows, HEAD_DIM_V, dtype=dtype)),
        "rotary": lambda: dict(zip(("rotary_cos", "rotary_sin"), quarter_turns(CAPACITY + 8, 3), strict=True)),
        "interleaved": lambda: options_of("rotary", dtype) | dict(rotary_interleaved=True),
        "cache_batch_idx": lambda: dict(cache_batch_idx=numbers(4, 0, 3)),
        "cache_leftpad": lambda: dict(cache_leftpad=numbers(4, 0, 1)),
        "k_scale": lambda: dict(k_scale=torch.tensor([0.5, -2.0])),
        "v_scale": lambda: dict(v_scale=2.0 ** torch.randint(-2, 2, (BATCH, HEADS_K)).float()),
        "not causal": lambda: dict(causal=False),
        "window": lambda: dict(window=(3, 1)),
        "scale": lambda: dict(scale=-0.3),
        "alibi_slopes": lambda: dict(alibi_slopes=torch.rand(BATCH, HEADS)),
        "softcap": lambda: dict(softcap=2.0),
        "sinks": lambda: dict(sinks=torch.randn(HEADS)),
    }[name]()


PAGED = {"pages of 1": 1, "pages of 3": 3, "pages of 16": 16}
FEATURES = (
    *PAGED, "pages apart", "float8", "many queries", "append", "rotary", "interleaved", "cache_batch_idx",
    "cache_leftpad", "k_scale", "v_scale", "not causal", "window", "scale", "alibi_slopes", "softcap", "sinks",
)  # fmt: skip


def go_together(*names: str) -> bool:
    """Whether features do not choose the same thing twice."""
    return sum(name in PAGED for name in names) <= 1 and not {"rotary", "interleaved"} <= set(names)


def case(*names: str, dtype: torch.dtype = torch.float64, place: Callable[..., torch.Tensor] | None = None) -> Case:
    """A call with features; `place` moves each tensor to where kernels run."""
    options: dict[str, Any] = {}
    for name in names:
        options |= {} if name in (*PAGED, "pages apart", "float8", "many queries") else options_of(name, dtype)
    new = NEW if "append" in names else 0
    lengths = numbers(*LENGTHS[:2], CAPACITY - new if "append" in names else LENGTHS[2])
    q = draw(BATCH, HEADS, 7 if "many queries" in names else 2, HEAD_DIM, dtype=dtype)
    stored = torch.float8_e4m3fn if "float8" in names else dtype
    size = next((PAGED[name] for name in names if name in PAGED), None)
    slots = options.get("cache_batch_idx", torch.arange(BATCH)).tolist()
    caches = [torch.full((SLOTS, HEADS_K, CAPACITY, d), float("nan"), dtype=dtype) for d in (HEAD_DIM, HEAD_DIM_V)]
    pads = options.get("cache_leftpad", numbers(0, 0, 0)).tolist()
    for slot, pad, length in zip(slots, pads, lengths.tolist(), strict=True):
        for cache in caches:
            cache[slot, :, pad:length] = draw(HEADS_K, max(length - pad, 0), cache.shape[3], dtype=dtype)
    if size is not None:
        options["block_table"], caches = paged(caches, size)
    if "pages apart" in names:  # [.., rows, heads_k, d] in memory, every other row
        caches = [x.transpose(1, 2).repeat_interleave(2, 1)[:, ::2].transpose(1, 2) for x in caches]
    options["cache_seqlens"] = lengths
    found = Case(q, *(x.to(stored) for x in caches), options)
    if place is None:
        return found
    moved = {name: place(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return Case(*(place(x) for x in found[:3]), moved)


def paged(caches: list[torch.Tensor], size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A table [slots, max_pages] of pages in random order, and what they hold: the dense caches' positions."""
    slots, heads_k, capacity, _ = caches[0].shape
    count = -(-capacity // size)
    table = torch.randperm(slots * count + 2)[: slots * count].view(slots, count)
    pages = []
    for x in caches:
        whole = torch.full((slots, heads_k, count * size, x.shape[3]), float("nan"), dtype=x.dtype)
        whole[:, :, :capacity] = x
        own = torch.full((slots * count + 2, heads_k, size, x.shape[3]), float("nan"), dtype=x.dtype)
        own[table.flatten()] = whole.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
        pages.append(own)
    return table.int(), pages
