"""Calls of the decode kernel on random caches, and how wrong its results may be.

Whatever a call must not read is NaN (keys) or no page (tables): rows past a sequence's length or under its left
padding, slots and pages of nobody.
"""

from typing import Any, NamedTuple

import torch

from flash import reference_cache
from flash.kernels.decode import decode
from flash.kernels.spec import Cache, Config, Mods, Positions, Rotary, Spec
from flash.problem import precision_of
from tests import bounds
from tests.bounds import Inputs, Outputs
from tests.calls import Place

SMALL = Config(block_m=16, block_n=16, num_warps=4, num_stages=1)
NONE = [-1, -(2**31), 2**31 - 1, 10**6]  # what an unused entry of a table says


class Call(NamedTuple):
    """A query, caches that hold the new keys already, how many those are, and keywords of `reference_cache.decode`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    options: dict[str, Any]
    new: int = 0


def random_call(
    place: Place,
    lengths: tuple[int, ...] = (50, 33),
    *,
    heads: int = 4,
    heads_k: int = 2,
    seqlen_q: int = 1,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    capacity: int | None = None,
    page_size: int | None = None,
    sigma: float = 1.0,
    new: int = 0,
    **options: Any,
) -> Call:
    """Normal queries and keys. Without a page_size the cache is dense; `stored` is its dtype, by default that of q.

    Tensors among the options are moved to where kernels run. With cache_batch_idx the slots are as many as it needs.
    """
    stored = dtype if stored is None else stored
    capacity = max((*lengths, 1)) if capacity is None else capacity
    options = {name: place(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    batch = len(lengths)
    slots = options["cache_batch_idx"].tolist() if "cache_batch_idx" in options else list(range(batch))
    pads = options["cache_leftpad"].tolist() if "cache_leftpad" in options else [0] * batch
    q = sigma * torch.randn(batch, heads, seqlen_q, head_dim)
    widths = (head_dim, head_dim if head_dim_v is None else head_dim_v)
    dense = [torch.full((max((*slots, -1)) + 1, heads_k, capacity, d), float("nan")) for d in widths]
    for slot, pad, length in zip(slots, pads, lengths, strict=True):
        for x in dense:
            x[slot, :, pad:length] = sigma * torch.randn(heads_k, length - pad, x.shape[3])
    options["cache_seqlens"] = place(torch.tensor(lengths, dtype=torch.int32) - new)
    caches = dense
    if page_size is not None:
        needed = {slot: (pad, length) for slot, pad, length in zip(slots, pads, lengths, strict=True)}
        *caches, table = in_pages(dense, needed, page_size)
        options["block_table"] = place(table)
    return Call(place(q.to(dtype)), *(place(x.to(stored)) for x in caches), options, new)


def in_pages(
    dense: list[torch.Tensor], needed: dict[int, tuple[int, int]], page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense caches cut into pages in random order, one more than needed; the table lists those that hold a key."""
    slots, _, capacity, _ = dense[0].shape
    lists = -(-capacity // page_size)
    table = torch.tensor(NONE)[torch.randint(len(NONE), (slots, lists))].to(torch.int32)
    order = iter(torch.randperm(slots * lists + 1).tolist())
    pages = [x.new_full((slots * lists + 1, x.shape[1], page_size, x.shape[3]), float("nan")) for x in dense]
    for slot, (pad, length) in needed.items():
        for index in range(pad // page_size, -(-length // page_size)):
            table[slot, index] = page = next(order)
            for x, own in zip(dense, pages, strict=True):
                rows = x[slot, :, index * page_size : (index + 1) * page_size]
                own[page, :, : rows.shape[1]] = rows
    return pages[0], pages[1], table


def run(x: Call, splits: int = 1, config: Config = SMALL, keys: int = 0) -> Outputs:
    """Run the decode kernel."""
    given = dict(x.options)
    factors = {name: given.get(name) for name in ("k_scale", "v_scale")}
    cache = Cache(
        x.k_cache,
        x.v_cache,
        given["cache_seqlens"],
        given.get("block_table"),
        given.get("cache_batch_idx"),
        given.get("cache_leftpad"),
        **{name: None if y is None else y if y.dim() == 2 else y[None] for name, y in factors.items()},
    )
    rotary = None
    if "rotary_cos" in given:
        rotary = Rotary(given["rotary_cos"], given["rotary_sin"], given.get("rotary_interleaved", False))
    slopes = given.get("alibi_slopes")
    mods = Mods(alibi_slopes=slopes if slopes is None or slopes.dim() == 2 else slopes[None], sinks=given.get("sinks"))
    causal, window, softcap = given.get("causal", True), given.get("window"), given.get("softcap")
    left, right = window if isinstance(window, tuple) else (window, window)
    right = None if causal else right
    scale = x.q.shape[3] ** -0.5 if given.get("scale") is None else given["scale"]
    spec = Spec(
        causal=causal,
        left=left is not None,
        right=right is not None,
        softcap=softcap,
        raw=scale > 0 and softcap is None and slopes is None,
        precision=precision_of(x.q),
    )
    positions = Positions(0, left or 0, right or 0)
    (o, lse, *_), _ = decode(x.q, cache, x.new, rotary, mods, spec, scale, positions, splits, config, keys)
    return Outputs(o, lse)


def oracle(x: Call) -> Outputs:
    """The result in float64; NaN for a bad sequence."""
    options = {name: y.cpu() if isinstance(y, torch.Tensor) else y for name, y in x.options.items()}
    lengths = options["cache_seqlens"].long()  # the new keys are in the caches: here they are as the others
    options["cache_seqlens"] = torch.where(lengths < 0, lengths, lengths + x.new)
    found = reference_cache.decode(x.q.cpu(), x.k_cache.cpu(), x.v_cache.cpu(), **options)
    return Outputs(found.o.to(x.q.device), found.lse.to(x.q.device))


def standard(x: Call, want: Outputs) -> tuple[Outputs, dict[str, float]]:
    """Standard attention of each sequence and key head in q's dtype, keys gathered; and the floors of `bounds`."""
    dtypes = x.q.dtype, torch.promote_types(x.q.dtype, torch.float32)
    found = Outputs(*(t.to(dtype, copy=True) for t, dtype in zip(want[:2], dtypes, strict=True)))
    floors = {"o": 0.0, "lse": 0.0}
    heads_k = x.k_cache.shape[1]
    group = x.q.shape[1] // heads_k
    for b in range(x.q.shape[0]):
        for h_k in range(heads_k if not bool(want.lse[b].isnan().all()) else 0):
            heads = slice(h_k * group, (h_k + 1) * group)
            own, times = alone(x, b, h_k, heads)
            plain = bounds.standard(own)
            found.o[b, heads] = (plain.o[0].double() * times).to(x.q.dtype)
            found.lse[b, heads] = plain.lse[0]
            for name, value in bounds.floors(own).items():
                if name in floors:
                    floors[name] = max(floors[name], value * (times if name == "o" else 1.0))
    return found, floors


def alone(x: Call, b: int, h_k: int, heads: slice) -> tuple[Inputs, float]:
    """One sequence and key head as a dense call, its keys gathered; and the factor of its values."""
    given = {name: y for name, y in x.options.items() if name in ("causal", "window", "softcap", "sinks", "scale")}
    total = int(x.options["cache_seqlens"][b]) + x.new
    slot = int(x.options["cache_batch_idx"][b]) if "cache_batch_idx" in x.options else b
    pad = int(x.options["cache_leftpad"][b]) if "cache_leftpad" in x.options else 0
    seqlen_q = x.q.shape[2]
    window = given.get("window")
    left = window[0] if isinstance(window, tuple) else window
    first = max(pad, 0 if left is None else min(max(total - seqlen_q - left, 0), total))
    p = torch.arange(first, total, device=x.q.device)
    page, row = torch.full_like(p, slot), p
    if "block_table" in x.options:
        page, row = x.options["block_table"][slot].long()[p // x.k_cache.shape[2]], p % x.k_cache.shape[2]
    k, v = (y[page, h_k, row][None, None].to(x.q.dtype) for y in (x.k_cache, x.v_cache))
    names = ("rotary_cos", "rotary_sin")
    cos, sin = (None if x.options.get(name) is None else x.options[name].cpu() for name in names)
    interleaved = x.options.get("rotary_interleaved", False)
    own = reference_cache.turn(x.q[b].cpu(), total - seqlen_q - pad, cos, sin, interleaved).to(x.q.device)
    slopes = x.options.get("alibi_slopes")
    if slopes is not None:
        given["alibi_slopes"] = (slopes[b] if slopes.dim() == 2 else slopes)[heads]
    if given.get("sinks") is not None:
        given["sinks"] = given["sinks"][heads]
    k_factor, v_factor = (factor_of(x.options.get(name), b, h_k) for name in ("k_scale", "v_scale"))
    scale = x.q.shape[3] ** -0.5 if given.get("scale") is None else given["scale"]
    given |= {"causal": given.get("causal", True), "q_offset": total - seqlen_q - first, "scale": scale * k_factor}
    return Inputs(own[None, heads], k, v, options=given), v_factor


def factor_of(x: torch.Tensor | None, b: int, h_k: int) -> float:
    """An element of a [heads_k] or [batch, heads_k] scale; 1 where there is none."""
    if x is None:
        return 1.0
    return float((x[b] if x.dim() == 2 else x)[h_k])


def check(got: Outputs, x: Call) -> None:
    """Raise where a result is further from the oracle than standard attention is, as `bounds` has it."""
    want = oracle(x)
    plain, floor = standard(x, want)
    good = ~want.lse.isnan()
    bad_rows = [b for b in range(x.q.shape[0]) if bool(want.lse[b].isnan().all()) and want.lse[b].numel()]
    for b in bad_rows:
        assert got.o[b].isnan().all() and got.lse[b].isnan().all(), f"sequence {b} is bad, and not all NaN"
    lines = []
    for name in ("o", "lse"):
        found, exact, usual = (getattr(t, name) for t in (got, want, plain))
        hide = ~good[..., None].expand_as(exact) if name == "o" else ~good
        found, exact, usual = (t.masked_fill(hide, 0.0) for t in (found, exact, usual))
        rule = bounds.rule_of(name, Inputs(x.q, x.q, x.q))
        lines += [f"{name}: {line}" for line in bounds.judge(found, exact, usual, rule, floor[name])]
    assert not lines, "\n".join(lines)


def equal(a: Outputs, b: Outputs) -> bool:
    """Whether two results have the same bits; every NaN is the same."""
    return all(torch.equal(x.nan_to_num(7e9), y.nan_to_num(7e9)) for x, y in ((a.o, b.o), (a.lse, b.lse)))
