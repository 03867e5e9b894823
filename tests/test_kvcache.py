"""flash_attn_with_kvcache: FlashAttention-2's signature, and a slice of its own test's grid, against the oracle."""

import inspect
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from flash.decode import flash_attention_decode
from flash.integrations import flash_attn_kvcache
from flash.integrations.flash_attn import flash_attn_with_kvcache
from flash.kernels.spec import Config
from flash.reference_cache import Decoded, decode, turn

SIGNATURE = (  # of flash_attn/flash_attn_interface.py
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
    "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
)
INF = float("inf")
BATCH, HEADS, D, DV, ROOM = 3, 6, 8, 10, 24
LENGTHS = (5, 0, 17)

# What a call has beside q and the caches. Of each group one, and none of rotary without new.
GRID = {
    "cache": ("dense", "slots", "padded", "pages of 4", "pages of 5, slots, padded"),
    "seen": ("all", "causal", "local", "causal and local"),
    "new": ("nothing", "as many", "fewer", "more"),
    "rotary": ("none", "interleaved", "halves"),
    "seqlen_q": (1, 5),
}
CASES = [x for x in itertools.product(*GRID.values()) if not (x[2] == "nothing" and x[3] != "none")]
CASES = [x for x in CASES if not (x[2] == "fewer" and x[4] == 1)]


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(
    cache: str = "dense", seen: str = "all", new: str = "nothing", rotary: str = "none", seqlen_q: int = 5,
    heads_k: int = 2, dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of flash_attn_with_kvcache, [batch, seqlen, heads, head_dim], by name."""
    x: dict[str, Any] = dict(q=torch.randn(BATCH, seqlen_q, HEADS, D).to(dtype), cache_seqlens=numbers(*LENGTHS))
    slots = 2 * BATCH if "slots" in cache else BATCH
    sizes = (slots, ROOM)
    if "pages" in cache:
        size = int(cache.split("of ")[1][0])
        columns = -(-ROOM // size)
        table = torch.randperm(slots * columns + 2)[: slots * columns].view(slots, columns)
        x["block_table"], sizes = table.int(), (slots * columns + 2, size)
    for name, d in (("k_cache", D), ("v_cache", DV)):
        x[name] = torch.randn(*sizes, heads_k, d).to(dtype)
    if "slots" in cache:
        x["cache_batch_idx"] = numbers(*torch.randperm(slots)[:BATCH].tolist())
    if "padded" in cache:
        x["cache_leftpad"] = numbers(2, 0, 7)
    if (count := {"nothing": 0, "as many": seqlen_q, "fewer": seqlen_q - 2, "more": seqlen_q + 2}[new]) > 0:
        x["k"], x["v"] = (torch.randn(BATCH, count, heads_k, d).to(dtype) for d in (D, DV))
    if rotary != "none":
        pairs = 4 if rotary == "halves" else 2
        angles = torch.rand(ROOM + 8, pairs) * 6
        x |= dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=rotary == "interleaved")
    x |= dict(causal="causal" in seen, window_size=(3, 2) if "local" in seen else (-1, -1))
    return x


def oracle(x: dict[str, Any]) -> Decoded:
    """What FlashAttention-2 says of such a call: positions of rows and keys spelled out, the rest by our oracle."""
    y = {"window_size": (-1, -1), "rotary_interleaved": True, "causal": False, **x}
    q, k_cache, v_cache = (y.pop(name).transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    k, v = (None if (t := y.pop(name, None)) is None else t.transpose(1, 2).clone() for name in ("k", "v"))
    cos, sin, interleaved = (y.pop(name, None) for name in ("rotary_cos", "rotary_sin", "rotary_interleaved"))
    left, right = (None if side < 0 else side for side in y.pop("window_size"))
    window = None if left is None and right is None else (left, right)
    if cos is not None:
        assert k is not None
        q = q.clone()
        for b, length in enumerate(y["cache_seqlens"].tolist()):
            start = length - (int(y["cache_leftpad"][b]) if "cache_leftpad" in y else 0)
            k[b] = turn(k[b], start, cos, sin, interleaved)
            for i in range(q.shape[2]):
                own = start + i if y["causal"] or window is not None else start
                q[b, :, i : i + 1] = turn(q[b, :, i : i + 1], own, cos, sin, interleaved)
    return decode(q, k_cache, v_cache, k=k, v=v, window=window, scale=y.pop("softmax_scale", None), **y)


def check(x: dict[str, Any], want: Decoded, tolerance: float = 1e-12, unit: float = 0.0) -> None:
    """Call with x, and compare o, lse and the caches; unit: how far apart numbers of o's dtype are."""
    x = {**x, "k_cache": x["k_cache"].clone(), "v_cache": x["v_cache"].clone()}
    o, lse = flash_attn_with_kvcache(**x, return_softmax_lse=True)
    compare: Any = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    compare(lse.double(), want.lse.masked_fill(want.lse == -INF, INF))
    torch.testing.assert_close(o.transpose(1, 2).double(), want.o, rtol=tolerance + unit, atol=tolerance)
    for name in ("k_cache", "v_cache"):
        compare(x[name].transpose(1, 2).double(), getattr(want, name).double())
    assert o.dtype == x["q"].dtype
    assert torch.equal(o, flash_attn_with_kvcache(**x))  # what is appended again is the same


def test_the_signature_is_fa2s() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(found) == SIGNATURE
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.sampled(6, all=True)
@pytest.mark.parametrize(GRID.keys(), CASES)
def test_every_case_of_the_grid_is_the_oracles(cache: str, seen: str, new: str, rotary: str, seqlen_q: int) -> None:
    heads_k = (1, 2, 6)[len(cache + seen + new) % 3]
    x = call(cache, seen, new, rotary, seqlen_q, heads_k)
    check(x, oracle(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache", GRID["cache"])
def test_other_dtypes_are_rounded_once(cache: str, dtype: torch.dtype) -> None:
    x = call(cache, "causal", "as many", "interleaved", dtype=dtype)
    check(x, oracle(x), 3e-6, torch.finfo(dtype).eps / 2)


KEYWORDS: dict[str, dict[str, Any]] = {
    "scale": dict(softmax_scale=0.7),
    "softcap": dict(softcap=1.5),
    "slopes": dict(alibi_slopes=torch.linspace(0.1, 0.9, HEADS), causal=True),
    "slopes of each sequence": dict(alibi_slopes=torch.linspace(0.1, 0.9, BATCH * HEADS).view(BATCH, HEADS)),
    "window to the left": dict(window_size=(4, -1)),
    "window to the right": dict(window_size=(-1, 2)),
    "window of tensors": dict(window_size=torch.tensor([4, 2])),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_is_the_oracles(name: str) -> None:
    x = {**call("pages of 5, slots, padded", "all", "fewer", "halves"), **KEYWORDS[name]}
    check(x, oracle({**x, "window_size": tuple(map(int, x["window_size"]))}))


def test_a_negative_softcap_and_any_number_of_splits_change_nothing() -> None:
    x = call()
    o = flash_attn_with_kvcache(**x)
    for keywords in (dict(softcap=-1.0), dict(num_splits=3), dict(num_splits=-1)):
        assert torch.equal(o, flash_attn_with_kvcache(**x, **keywords))


@pytest.mark.parametrize("cache", ["dense", "pages of 4", "pages of 5, slots, padded"])
def test_lengths_may_be_one_number_or_left_out(cache: str) -> None:
    x = call(cache)
    for given, length in ((9, 9), (0, 0), (None, x["block_table"].shape[1] * 5 if "5" in cache else ROOM)):
        if "padded" in cache and length == 0:
            continue  # leftpad is longer
        same = {**x, "cache_seqlens": numbers(*[length] * BATCH)}
        check({**x, "cache_seqlens": given}, oracle(same))
    x = call(cache, new="as many")
    check({**x, "cache_seqlens": 9}, oracle({**x, "cache_seqlens": numbers(*[9] * BATCH)}))


class OneLength(torch.nn.Module):
    def forward(self, q: torch.Tensor, cache: torch.Tensor, length: int) -> Any:
        return flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length)


@pytest.mark.parametrize("strict", [True, False])
def test_one_length_may_be_numpys_or_symbolic(strict: bool) -> None:
    x = torch.randn(BATCH, 1, HEADS, D), torch.randn(BATCH, ROOM, HEADS, D)
    attend = OneLength()
    assert torch.equal(attend(*x, np.int64(7)), attend(*x, 7))
    shapes = {"q": None, "cache": None, "length": torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(attend, (*x, 5), dynamic_shapes=shapes, strict=strict).module()
    for length in (7, ROOM):
        assert torch.equal(program(*x, length), attend(*x, length))
        assert not torch.equal(program(*x, length), attend(*x, length - 1))


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(2, 5), (5, 2)])
def test_causal_is_aligned_to_the_last_key(seqlen_q: int, seqlen_k: int) -> None:
    """The two pictures of flash-attn's docstring."""
    seen = {(2, 5): ["11110", "11111"], (5, 2): ["00", "00", "00", "10", "11"]}[seqlen_q, seqlen_k]
    q, k = torch.randn(1, seqlen_q, 1, D), torch.randn(1, seqlen_k, 1, D)
    v = torch.eye(seqlen_k)[None, :, None]  # o is the weights
    o, lse = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
    assert o.shape == (1, seqlen_q, 1, seqlen_k)
    for i, picture in enumerate(seen):
        assert torch.equal(o[0, i, 0] > 0, torch.tensor([c == "1" for c in picture]))
        assert (lse[0, 0, i] == INF) == ("1" not in picture)  # and o is zero


def test_a_bad_sequence_is_nan_and_the_others_are_as_they_were() -> None:
    x = call("pages of 4", "causal", "fewer", "halves")  # q and k are turned before the call
    before = {name: x[name].clone() for name in ("k_cache", "v_cache")}
    want = flash_attn_with_kvcache(**{**x, **{name: t.clone() for name, t in before.items()}})
    for bad in (-1, -(2**31), 2**31 - 1, ROOM):
        x["cache_seqlens"] = numbers(LENGTHS[0], bad, LENGTHS[2])
        caches = {name: t.clone() for name, t in before.items()}
        o, lse = flash_attn_with_kvcache(**{**x, **caches}, return_softmax_lse=True)
        assert bool(o[1].isnan().all() and lse[1].isnan().all())
        assert torch.equal(o[::2], want[::2]), "others changed"
        assert torch.equal(caches["k_cache"][x["block_table"][1]], before["k_cache"][x["block_table"][1]])


def test_positions_past_the_rotary_tables_are_nan() -> None:
    x = call("dense", "all", "as many", "halves")
    x["rotary_cos"], x["rotary_sin"] = x["rotary_cos"][:17], x["rotary_sin"][:17]
    o = flash_attn_with_kvcache(**x)
    assert bool(o[:2].isfinite().all() and o[2].isnan().all())  # the last sequence begins at 17


ERRORS: dict[str, dict[str, Any]] = {
    "q must be": dict(q=torch.randn(5, HEADS, D)),
    r"k_cache must be \[slots, max_seqlen": dict(k_cache=torch.randn(ROOM, 2, D)),
    "v_cache must be": dict(v_cache=torch.randn(ROOM, 2, D)),
    "k must be": dict(k=torch.randn(5, 2, D)),
    "v must be": dict(v=torch.randn(5, 2, D)),
    "k and v must be given together": dict(v=None),
    "k must be given with rotary_cos": dict(k=None, v=None),
    "rotary_sin": dict(rotary_sin=None),
    "rotary_cos must have shape": dict(rotary_cos=torch.randn(9, D)),
    "cache_seqlens must be given with k": dict(cache_seqlens=None),
    "cache_seqlens must be 0 to 21": dict(cache_seqlens=22),
    "cache_seqlens must be of dtype int32": dict(cache_seqlens=torch.tensor(LENGTHS)),
    "cache_seqlens must have shape": dict(cache_seqlens=numbers(3)),
    "window_size": dict(window_size=3),
    "softcap": dict(softcap=None),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_arguments_are_named(message: str) -> None:
    x = {**call("dense", "all", "fewer", "halves"), **ERRORS[message]}
    before = [x[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**x)
    assert all(torch.equal(x[name], t) for name, t in zip(("k_cache", "v_cache"), before, strict=True))


def test_a_derivative_is_refused() -> None:
    x = call()
    x["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="q asks for a derivative"):
        flash_attn_with_kvcache(**x)
    with torch.no_grad():
        flash_attn_with_kvcache(**x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("case", CASES[:: len(CASES) // 12], ids=lambda case: ", ".join(map(str, case)))
def test_triton_kernels_serve_the_grid(case: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Config(16, 16, 4, 1)
    kernels = partial(flash_attention_decode, backend="triton", config=small)
    monkeypatch.setattr(flash_attn_kvcache, "flash_attention_decode", kernels)
    x = call(*case, dtype=torch.float32)
    want = oracle(x)
    there = {name: place(t) if isinstance(t, torch.Tensor) else t for name, t in x.items()}
    o, lse = flash_attn_with_kvcache(**there, num_splits=2, return_softmax_lse=True)
    torch.testing.assert_close(o.transpose(1, 2).cpu().double(), want.o, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(lse.cpu().double(), want.lse.masked_fill(want.lse == -INF, INF), rtol=3e-6, atol=3e-6)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(there[name].transpose(1, 2).cpu(), getattr(want, name))
