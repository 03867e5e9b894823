"""The user functions that we ship, each a Triton function beside its torch twin; ScoreMod and MaskMod to make more.

Numbers travel as small tensors in `args`, so that one compiled kernel serves all values. Every index is held within the
table that it reads, so that hostile lengths read no stray memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from types import SimpleNamespace
from typing import Any

import torch

from .kernels.spec import Spans
from .twins import MaskMod, ScoreMod, from_handle, handle_of

try:
    import triton
    import triton.language as tl
except ImportError:
    # macOS and Windows: these mods then have no Triton function, and only the torch backend serves them
    triton = SimpleNamespace(jit=lambda fn: None)

__all__ = [
    "MaskMod",
    "ScoreMod",
    "alibi",
    "dilated_window",
    "document",
    "from_handle",
    "handle_of",
    "neighborhood_2d",
    "prefix_lm",
    "relative_position",
    "tanh_softcap",
]

FARTHEST = 2**30  # beyond any length; twice that still fits an int32


@triton.jit
def _within(x, length):
    """Indices held within 0 ... length - 1."""
    return tl.maximum(tl.minimum(x, length - 1), 0)


def _held(x: torch.Tensor, length: int) -> torch.Tensor:
    """Indices held within 0 ... length - 1."""
    return x.clamp(max=length - 1).clamp(min=0)


def _numbers(device: Any, *values: int) -> torch.Tensor:
    """Whole numbers as an argument of a user function: int32."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def _whole(name: str, value: Any, least: int) -> int:
    """A whole number no smaller than `least`, held within FARTHEST."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    return min(value, FARTHEST)


def _table(name: str, x: Any, dims: tuple[int, ...], floating: bool) -> torch.Tensor:
    """A contiguous table of one of these numbers of axes, a missing first axis being 1."""
    kind = "float" if floating else "int"
    if not isinstance(x, torch.Tensor) or x.dtype == torch.bool or x.is_complex() or x.is_floating_point() != floating:
        raise ValueError(f"{name} must be a tensor of {kind}s, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} axes, got shape {tuple(x.shape)}")
    return (x.unsqueeze(0) if x.dim() < dims[-1] else x).contiguous()


def _holds(name: str, axis: str, found: int, needed: int, repeats: bool = False) -> None:
    """Raise ValueError where a table's axis is too short for a call; one of 1 serves every index where it repeats."""
    if found < needed and not (repeats and found == 1):
        raise ValueError(f"{name} must reach all {needed} of {axis}, got {found}")


def _spans(begins: torch.Tensor, ends: torch.Tensor, other: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds as Spans wants them, [batch or 1, 1, seqlen] int32; an empty one becomes (other, 0)."""
    begins, ends = begins.clamp(min=0), ends.clamp(max=other)
    empty = begins >= ends
    bounds = begins.masked_fill(empty, other), ends.masked_fill(empty, 0)
    first, last = (x.to(torch.int32).reshape(-1, 1, x.shape[-1]) for x in bounds)
    return first, last


@triton.jit
def _id(ids, batch, length, b, x):
    """ids[b, x] of a [batch, length] table."""
    return tl.load(ids + _within(b, batch).to(tl.int64) * length + _within(x, length))


@triton.jit
def _document(b, h, i, j, args):
    q_ids, k_ids, sizes = args
    batch, length_q, length_k = tl.load(sizes), tl.load(sizes + 1), tl.load(sizes + 2)
    return _id(q_ids, batch, length_q, b, i) == _id(k_ids, batch, length_k, b, j)


def _document_torch(b, h, i, j, args):
    q_ids, k_ids, _ = args
    row = _held(b, q_ids.shape[0])
    return q_ids[row, _held(i, q_ids.shape[1])] == k_ids[row, _held(j, k_ids.shape[1])]


def _document_check(batch, heads, seqlen_q, seqlen_k, args) -> None:
    q_ids, k_ids, _ = args
    _holds("document's ids", "batch", q_ids.shape[0], batch, repeats=True)
    _holds("document's q_ids", "seqlen_q", q_ids.shape[1], seqlen_q)
    _holds("document's k_ids", "seqlen_k", k_ids.shape[1], seqlen_k)


def _equal_span(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the first to past the last element of `other` [.., n] that equals each of `own` [.., m]."""
    if other.shape[-1] == 0:
        return torch.zeros_like(own), torch.zeros_like(own)
    ordered, order = other.contiguous().sort(dim=-1, stable=True)
    before = torch.searchsorted(ordered, own.contiguous())
    after = torch.searchsorted(ordered, own.contiguous(), right=True)
    first = order.gather(-1, before.clamp(max=other.shape[-1] - 1))
    last = order.gather(-1, (after - 1).clamp(min=0))
    return first.where(before < after, 0), (last + 1).where(before < after, 0)


def _document_spans(seqlen_q, seqlen_k, args) -> Spans:
    q_ids, k_ids = args[0][:, :seqlen_q], args[1][:, :seqlen_k]
    keys, queries = _equal_span(q_ids, k_ids), _equal_span(k_ids, q_ids)
    return Spans(*_spans(*keys, seqlen_k), *_spans(*queries, seqlen_q))


def document(q_ids: torch.Tensor, k_ids: torch.Tensor | None = None) -> MaskMod:
    """Queries see the keys of their own document (segment), and no other.

        key j is visible to query i where q_ids[b, i] == k_ids[b, j]

    Args:
        q_ids: document of each query, [batch, seqlen_q] or, for every batch element, [seqlen_q]; any integer dtype.
        k_ids: document of each key, likewise with seqlen_k. Default: q_ids, as queries and keys share their places.

    Returns:
        A MaskMod. Its spans are exact where documents are contiguous.

    Raises:
        ValueError: ids are no integer tensors of 1 or 2 axes, or those of queries and keys do not go together.

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", https://arxiv.org/abs/2107.02027.
    """
    q_ids = _table("q_ids", q_ids, (1, 2), floating=False)
    k_ids = q_ids if k_ids is None else _table("k_ids", k_ids, (1, 2), floating=False)
    if (q_ids.shape[0], q_ids.dtype, q_ids.device) != (k_ids.shape[0], k_ids.dtype, k_ids.device):
        raise ValueError(
            f"k_ids must share batch, dtype and device of q_ids: expected {q_ids.shape[0]}, {q_ids.dtype} on "
            f"{q_ids.device}, got {k_ids.shape[0]}, {k_ids.dtype} on {k_ids.device}"
        )
    sizes = _numbers(q_ids.device, q_ids.shape[0], q_ids.shape[1], k_ids.shape[1])
    return MaskMod(_document, _document_torch, (q_ids, k_ids, sizes), _document_spans, _document_check)


@triton.jit
def _prefix_lm(b, h, i, j, args):
    lengths, sizes = args
    return (j < tl.load(lengths + _within(b, tl.load(sizes)))) | (j <= i)


def _prefix_lm_torch(b, h, i, j, args):
    lengths, _ = args
    return (j < lengths[_held(b, lengths.shape[0])]) | (j <= i)


def _prefix_lm_check(batch, heads, seqlen_q, seqlen_k, args) -> None:
    _holds("prefix_lm's lengths", "batch", args[0].shape[0], batch, repeats=True)


def _prefix_lm_spans(seqlen_q, seqlen_k, args) -> Spans:
    lengths = args[0][:, None]
    i, j = (torch.arange(n, device=lengths.device)[None] for n in (seqlen_q, seqlen_k))
    keys = torch.zeros_like(i + lengths), torch.maximum(i + 1, lengths)
    queries = (j + 0 * lengths).masked_fill(j < lengths, 0), torch.full_like(j + lengths, seqlen_q)
    return Spans(*_spans(*keys, seqlen_k), *_spans(*queries, seqlen_q))


def prefix_lm(lengths: torch.Tensor) -> MaskMod:
    """Queries see a prefix whole, and what follows it causally.

        key j is visible to query i where j < lengths[b] or j <= i

    Args:
        lengths: keys in the prefix, [batch] or [1], any integer dtype.

    Returns:
        A MaskMod with exact spans.

    Raises:
        ValueError: lengths is no integer tensor of one axis.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), https://arxiv.org/abs/1910.10683.
    """
    lengths = _table("lengths", lengths, (1,), floating=False)
    args = (lengths, _numbers(lengths.device, lengths.shape[0]))
    return MaskMod(_prefix_lm, _prefix_lm_torch, args, _prefix_lm_spans, _prefix_lm_check)


@triton.jit
def _dilated_window(b, h, i, j, args):
    reach, dilation = tl.load(args[0]), tl.load(args[0] + 1)
    return (tl.abs(i - j) <= reach) & (i % dilation == j % dilation)


def _dilated_window_torch(b, h, i, j, args):
    reach, dilation = args[0].unbind()
    return ((i - j).abs() <= reach) & (i % dilation == j % dilation)


def _dilated_span(own: int, other: int, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of `own` positions reaches of `other` ones, step by step both ways."""
    x, (reach, dilation) = torch.arange(own, device=args[0].device), args[0].unbind()
    steps = reach // dilation
    back = torch.minimum(x // dilation, steps)
    on = torch.minimum((other - 1 - x).div(dilation, rounding_mode="floor"), steps)
    return x - back * dilation, x + on * dilation + 1


def _dilated_window_spans(seqlen_q, seqlen_k, args) -> Spans:
    keys, queries = _dilated_span(seqlen_q, seqlen_k, args), _dilated_span(seqlen_k, seqlen_q, args)
    return Spans(*_spans(*keys, seqlen_k), *_spans(*queries, seqlen_q))


def dilated_window(width: int, dilation: int = 1, device: Any = None) -> MaskMod:
    """Queries see `width` keys on either side, `dilation` apart, and the one at their own place.

        key j is visible to query i where |i - j| <= width * dilation and (i - j) mod dilation = 0

    Args:
        width: keys on either side, >= 0.
        dilation: from one of them to the next, >= 1. Default: 1, a plain window.
        device: of q, k and v. Default: torch's default device.

    Returns:
        A MaskMod with exact spans.

    Raises:
        ValueError: width or dilation is no such number.

    Source: Beltagy et al. 2020, "Longformer", https://arxiv.org/abs/2004.05150.
    """
    width, dilation = _whole("width", width, 0), _whole("dilation", dilation, 1)
    numbers = _numbers(device, min(width, FARTHEST // dilation) * dilation, dilation)
    return MaskMod(_dilated_window, _dilated_window_torch, (numbers,), _dilated_window_spans)


@triton.jit
def _neighborhood_2d(b, h, i, j, args):
    height, width, radius = tl.load(args[0]), tl.load(args[0] + 1), tl.load(args[0] + 2)
    near = (tl.abs(i // width - j // width) <= radius) & (tl.abs(i % width - j % width) <= radius)
    return near & (i < height * width) & (j < height * width)


def _neighborhood_2d_torch(b, h, i, j, args):
    height, width, radius = args[0].unbind()
    near = ((i // width - j // width).abs() <= radius) & ((i % width - j % width).abs() <= radius)
    return near & (i < height * width) & (j < height * width)


def _neighborhood_span(own: int, other: int, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """From the first to past the last pixel, of `other` ones, near each of `own` pixels."""
    height, width, radius = args[0].unbind()
    pixel = torch.arange(own, device=args[0].device)
    y, x = pixel // width, pixel % width
    left, right = (x - radius).clamp(min=0), torch.minimum(x + radius, width - 1)
    begin = (y - radius).clamp(min=0) * width + left
    end = torch.minimum(y + radius, height - 1) * width + right + 1
    return begin, end.masked_fill(pixel >= height * width, 0)


def _neighborhood_2d_spans(seqlen_q, seqlen_k, args) -> Spans:
    keys, queries = _neighborhood_span(seqlen_q, seqlen_k, args), _neighborhood_span(seqlen_k, seqlen_q, args)
    return Spans(*_spans(*keys, seqlen_k), *_spans(*queries, seqlen_q))


def neighborhood_2d(height: int, width: int, radius: int, device: Any = None) -> MaskMod:
    """Pixels of an image, in rows, see the square of pixels around them.

        key j is visible to query i where |i // width - j // width| <= radius and |i % width - j % width| <= radius

    Args:
        height: pixels in a column, >= 1; what lies past height * width sees nothing and is not seen.
        width: pixels in a row, >= 1.
        radius: pixels seen on either side, >= 0; the square is cut at the image's edges.
        device: of q, k and v. Default: torch's default device.

    Returns:
        A MaskMod with exact spans.

    Raises:
        ValueError: a number is no such number, or the image is beyond any sequence.

    Source: Hassani et al. 2023, "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143 (there the
        square is moved at the edges, not cut).
    """
    height, width, radius = _whole("height", height, 1), _whole("width", width, 1), _whole("radius", radius, 0)
    if height * width > FARTHEST:
        raise ValueError(f"height * width must be at most {FARTHEST}, got {height * width}")
    # a radius beyond the image sees all of it; a larger one would overflow when multiplied by the width
    args = (_numbers(device, height, width, min(radius, max(height, width))),)
    return MaskMod(_neighborhood_2d, _neighborhood_2d_torch, args, _neighborhood_2d_spans)


@triton.jit
def _one(s, b, h, i, j, args):
    return tl.full(s.shape, 1.0, s.dtype)


@triton.jit
def _relative_position(s, b, h, i, j, args):
    table, sizes = args
    heads, farthest = tl.load(sizes), tl.load(sizes + 1)
    row = _within(h, heads).to(tl.int64) * (2 * farthest + 1) + farthest
    return s + tl.load(table + row + tl.maximum(tl.minimum(i - j, farthest), -farthest)).to(s.dtype)


def _relative_position_torch(s, b, h, i, j, args):
    table, _ = args
    farthest = table.shape[1] // 2
    return s + table[_held(h, table.shape[0]), (i - j).clamp(-farthest, farthest) + farthest].to(s.dtype)


def _relative_position_check(batch, heads, seqlen_q, seqlen_k, args) -> None:
    _holds("relative_position's table", "heads", args[0].shape[0], heads, repeats=True)


def relative_position(table: torch.Tensor, max_distance: int) -> ScoreMod:
    """A learned number for each head and distance joins the score.

        s_ij <- s_ij + table[h, clamp(i - j, -max_distance, max_distance) + max_distance]

    Args:
        table: [heads, 2 * max_distance + 1] or, for every head, [2 * max_distance + 1]; any float dtype, in natural
            logarithm units. It gets no gradient: one that asks for it is refused by the call.
        max_distance: beyond it, all distances are alike; >= 0.

    Returns:
        A ScoreMod.

    Raises:
        ValueError: the table is no float tensor of that shape, or max_distance is no such number.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 2.1,
        https://arxiv.org/abs/1910.10683.
    """
    farthest = _whole("max_distance", max_distance, 0)
    table = _table("table", table, (1, 2), floating=True)
    if table.shape[1] != 2 * farthest + 1:
        raise ValueError(f"table must hold 2 * max_distance + 1 = {2 * farthest + 1} distances, got {table.shape[1]}")
    args = (table, _numbers(table.device, table.shape[0], farthest))
    return ScoreMod(_relative_position, _relative_position_torch, _one, args, _relative_position_check)


@triton.jit
def _alibi(s, b, h, i, j, args):
    slopes, sizes = args
    batch, heads = tl.load(sizes), tl.load(sizes + 1)
    slope = tl.load(slopes + _within(b, batch).to(tl.int64) * heads + _within(h, heads)).to(s.dtype)
    return s - slope * tl.abs(i - j).to(s.dtype)


def _alibi_torch(s, b, h, i, j, args):
    slopes, _ = args
    slope = slopes[_held(b, slopes.shape[0]), _held(h, slopes.shape[1])].to(s.dtype)
    return s - slope * (i - j).abs().to(s.dtype)


def _alibi_check(batch, heads, seqlen_q, seqlen_k, args) -> None:
    _holds("alibi's slopes", "batch", args[0].shape[0], batch, repeats=True)
    _holds("alibi's slopes", "heads", args[0].shape[1], heads)


def alibi(slopes: torch.Tensor) -> ScoreMod:
    """The score falls with the distance between the raw indices, at a slope of each head.

        s_ij <- s_ij - slopes[b, h] * |i - j|

    The keyword alibi_slopes counts from q_offset, and gives a gradient; this one does neither.

    Args:
        slopes: [heads] or [batch, heads], any float dtype.

    Returns:
        A ScoreMod.

    Raises:
        ValueError: slopes is no float tensor of 1 or 2 axes.

    Source: Press et al. 2022, "Train Short, Test Long", https://arxiv.org/abs/2108.12409.
    """
    slopes = _table("slopes", slopes, (1, 2), floating=True)
    args = (slopes, _numbers(slopes.device, *slopes.shape))
    return ScoreMod(_alibi, _alibi_torch, _one, args, _alibi_check)


@triton.jit
def _tanh(x):
    """tanh(x): a rational function (Cephes) where 1 - exp(-2|x|) would lose digits."""
    z, e = x * x, tl.exp(-2.0 * tl.abs(x))
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.390625, x + x * z * p / q, tl.where(x < 0.0, -far, far))


@triton.jit
def _tanh_softcap(s, b, h, i, j, args):
    cap = tl.load(args[0]).to(s.dtype)
    return cap * _tanh(s / cap)


@triton.jit
def _tanh_softcap_derivative(s, b, h, i, j, args):
    e = tl.exp(-2.0 * tl.abs(s / tl.load(args[0]).to(s.dtype)))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


def _tanh_softcap_torch(s, b, h, i, j, args):
    cap = args[0].to(s.dtype)
    return cap * torch.tanh(s / cap)


def tanh_softcap(cap: float, device: Any = None) -> ScoreMod:
    """The score is bent smoothly to stay within a cap, after bias and ALiBi (the keyword softcap acts before them).

        s_ij <- cap * tanh(s_ij / cap)

    Args:
        cap: the bound, finite and > 0.
        device: of q, k and v. Default: torch's default device.

    Returns:
        A ScoreMod.

    Raises:
        ValueError: cap is no such number.

    Source: Gemma Team 2024, "Gemma 2", https://arxiv.org/abs/2408.00118.
    """
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 < cap < float("inf"):
        raise ValueError(f"cap must be a finite number > 0, got {cap!r}")
    place = torch.empty(0, device=device).device
    dtype = torch.float32 if place.type == "mps" else torch.float64  # no float64 there
    args = (torch.tensor([cap], dtype=dtype, device=place),)
    return ScoreMod(_tanh_softcap, _tanh_softcap_torch, _tanh_softcap_derivative, args)
