"""What is wrong with an argument of flash_attention_decode is named: the argument, what was expected, what came."""

import re
from typing import Any

import pytest
import torch

from flash import Config, flash_attention_decode
from flash.kernels.spec import Cache, Positions, Rotary
from tests.decode_cases import step_of

BATCH, HEADS, HEADS_K, HEAD_DIM, CAPACITY = 2, 4, 2, 8, 12


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def good(**changes: Any) -> dict[str, Any]:
    """The arguments of a call, some of them others."""
    cache = floats(BATCH, HEADS_K, CAPACITY, HEAD_DIM)
    base: dict[str, Any] = dict(
        q=floats(BATCH, HEADS, 1, HEAD_DIM), k_cache=cache, v_cache=cache.clone(), cache_seqlens=integers(BATCH)
    )
    return {**base, **changes}


def append(rows: int = 1, **changes: Any) -> dict[str, Any]:
    """Changes that append."""
    return {"k": floats(BATCH, HEADS_K, rows, HEAD_DIM), "v": floats(BATCH, HEADS_K, rows, HEAD_DIM), **changes}


def angles(**changes: Any) -> dict[str, Any]:
    """Changes that turn."""
    return {"rotary_cos": floats(20, 4), "rotary_sin": floats(20, 4), **changes}


PAGES = dict(block_table=integers(BATCH, 3))

WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(q=None), "q must be a torch.Tensor, got NoneType"),
    (dict(q=floats(BATCH, 1, HEAD_DIM)), "q must have 4 dimensions [batch, heads, seqlen_q, head_dim], got shape"),
    (dict(q=floats(BATCH, HEADS, 1, HEAD_DIM, dtype=torch.int32)), "q must be float16, bfloat16, float32 or float64"),
    (dict(q=floats(BATCH, HEADS, 1, 0)), "q must have a head_dim from 1 to 512, got 0"),
    (dict(q=floats(BATCH, HEADS, 1, 513)), "q must have a head_dim from 1 to 512, got 513"),
    (dict(q=torch.empty(1, 1, 2**30, 1, device="meta")), "q must have a seqlen of at most 1073741312, got 1073741824"),
    (dict(k_cache=None), "k_cache must be a torch.Tensor, got NoneType"),
    (dict(k_cache=floats(HEADS_K, CAPACITY, HEAD_DIM)), "k_cache must have 4 dimensions, got shape [2, 12, 8]"),
    (dict(k_cache=floats(2, 2, 12, 8, dtype=torch.float64)), "k_cache must be float32 or float16 or bfloat16 or"),
    (dict(k_cache=floats(2, 2, 12, 8, dtype=torch.float8_e5m2)), "which float32 of q holds, got float8_e5m2"),
    (dict(q=floats(2, 4, 1, 8).half()), "k_cache must be float16 or float8_e4m3fn, which float16 of q holds, got flo"),
    (dict(q=floats(2, 4, 1, 8).bfloat16()), "k_cache must be bfloat16 or float8_e4m3fn, which bfloat16 of q holds"),
    (dict(k_cache=floats(2, 2, 12, 8).to("meta")), "k_cache must be on device cpu like q, got meta"),
    (dict(k_cache=floats(2, 2, 12, 7)), "k_cache must have head_dim 8 like q, got 7"),
    (dict(v_cache=floats(2, 2, 12, 600)), "v_cache must have a head_dim from 1 to 512, got 600"),
    (dict(v_cache=floats(2, 2, 12, 8).half()), "v_cache must have dtype float32 like k_cache, got float16"),
    (dict(v_cache=floats(2, 4, 12, 8)), "v_cache must have heads_k 2 like k_cache, got 4"),
    (dict(v_cache=floats(3, 2, 12, 8)), "v_cache must have slots 2 like k_cache, got 3"),
    (dict(v_cache=floats(2, 2, 11, 8)), "v_cache must have max_seqlen 12 like k_cache, got 11"),
    (dict(v_cache=floats(3, 2, 12, 8), **PAGES), "v_cache must have pages 2 like k_cache, got 3"),
    (dict(v_cache=floats(2, 2, 11, 8), **PAGES), "v_cache must have page_size 12 like k_cache, got 11"),
    (dict(q=floats(BATCH, 3, 1, HEAD_DIM)), "k_cache must have a number of heads that divides q's 3, got 2"),
    (
        dict(k_cache=floats(1, 2, 12, 8), v_cache=floats(1, 2, 12, 8)),
        "k_cache must have a slot for each of q's batch 2",
    ),
    (dict(block_table=integers(1, 3)), "block_table must have a slot for each of q's batch 2 sequences, got 1"),
    (dict(block_table=[[0]]), "block_table must be a torch.Tensor, got list"),
    (dict(block_table=integers(2, 3).long()), "block_table must be of dtype int32, got int64"),
    (dict(block_table=integers(2)), "block_table must have shape [slots, max_pages], got [2]"),
    (dict(block_table=integers(2, 1).expand(2, 2**27)), "block_table must list at most 1073741312 positions, got 134"),
    (dict(k_cache=floats(2, 2, 0, 8), v_cache=floats(2, 2, 0, 8), **PAGES), "k_cache must have a page_size of at lea"),
    (dict(cache_seqlens=None), "cache_seqlens must be a torch.Tensor, got NoneType"),
    (dict(cache_seqlens=3), "cache_seqlens must be a torch.Tensor, got int"),
    (dict(cache_seqlens=integers(BATCH).long()), "cache_seqlens must be of dtype int32, got int64"),
    (dict(cache_seqlens=integers(3)), "cache_seqlens must have shape [2] (batch), got [3]"),
    (dict(cache_batch_idx=integers(1)), "cache_batch_idx must have shape [2] (batch), got [1]"),
    (dict(cache_batch_idx=floats(2)), "cache_batch_idx must be of dtype int32, got float32"),
    (dict(cache_leftpad=integers(2, 1)), "cache_leftpad must have shape [2] (batch), got [2, 1]"),
    (dict(cache_leftpad=integers(2).to("meta")), "cache_leftpad must be on device cpu like q, got meta"),
    (append(v=None), "k and v must be given together, got only k"),
    (append(k=None), "k and v must be given together, got only v"),
    (append(k=floats(2, 2, 1, 8).half()), "k must have dtype float32 like q, got float16"),
    (append(k=floats(2, 1, 8)), "k must have 4 dimensions [batch, heads_k, new, head_dim], got [2, 1, 8]"),
    (append(v=floats(1, 2, 1, 8)), "v must have batch 2 like q, got 1"),
    (append(v=floats(2, 4, 1, 8)), "v must have heads_k 2 like v_cache, got 4"),
    (append(k=floats(2, 2, 1, 7)), "k must have head_dim 8 like k_cache, got 7"),
    (append(v=floats(2, 2, 2, 8)), "v must have seqlen 1 like k, got 2"),
    (append(v=floats(2, 2, 1, 8).to("meta")), "v must be on device cpu like q, got meta"),
    (
        append(k_cache=floats(1, 2, 1, 8).expand(2, -1, 12, -1)),
        "k_cache must have an element for each index where k is given, got an expanded one",
    ),
    (angles(rotary_sin=None), "rotary_cos and rotary_sin must be given together, got only rotary_cos"),
    (angles(rotary_cos=None), "rotary_cos and rotary_sin must be given together, got only rotary_sin"),
    (
        angles(rotary_cos=floats(20, 5)),
        "rotary_cos must have shape [positions, pairs], at least one position and 1 to 4",
    ),
    (angles(rotary_cos=floats(0, 4)), "rotary_cos must have shape [positions, pairs]"),
    (angles(rotary_sin=floats(20, 3)), "rotary_sin must have shape [20, 4] like rotary_cos, got [20, 3]"),
    (angles(rotary_sin=integers(20, 4)), "rotary_sin must be float16, bfloat16, float32 or float64, got int32"),
    (angles(rotary_interleaved=1), "rotary_interleaved must be True or False, got 1"),
    (dict(k_scale=2.0), "k_scale must be a torch.Tensor, got float"),
    (dict(k_scale=floats(2).half()), "k_scale must be float32, got float16"),
    (dict(v_scale=floats(4)), "v_scale must have shape [2] (heads_k) or [2, 2] (batch, heads_k), got [4]"),
    (dict(causal=None), "causal must be True or False, got None"),
    (dict(window=-1), "window must be >= 0 on each side (None: unbounded), got -1"),
    (dict(scale=float("nan")), "scale must be a finite float or None, got nan"),
    (dict(alibi_slopes=floats(2)), "alibi_slopes must have shape [4] (heads) or [2, 4] (batch, heads), got [2]"),
    (dict(softcap=0.0), "softcap must be a finite float > 0 or None, got 0.0"),
    (dict(sinks=floats(2)), "sinks must have shape [4] (heads), got [2]"),
    (dict(num_splits=0), "num_splits must be an int >= 1 or None, got 0"),
    (dict(num_splits=True), "num_splits must be an int >= 1 or None, got True"),
    (dict(num_splits=2.0), "num_splits must be an int >= 1 or None, got 2.0"),
    (dict(batch_invariant=1), "batch_invariant must be True or False, got 1"),
    (dict(return_lse="yes"), "return_lse must be True or False, got 'yes'"),
    (dict(backend="cuda"), "backend must be one of auto, triton, hopper, torch, got 'cuda'"),
    (dict(config={"forward": Config(16, 16)}), "config must be a flash.Config or None, got {"),
    (dict(config=Config(8, 16)), "config.block_m must be one of (16, 32, 64, 128, 256), got 8"),
    (dict(config=Config(16, 16, ahead=True)), "config.ahead must be one of (False,), got True"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    if changes.get("q") is not None and changes["q"].device.type == "meta":
        changes = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in good(**changes).items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention_decode(**good(**changes))


def test_a_backend_asked_for_by_name_says_why_it_does_not_serve() -> None:
    with pytest.raises(
        NotImplementedError, match="'hopper' does not decode float32 .* no Hopper kernels; use backend="
    ):
        flash_attention_decode(**good(backend="hopper"))


def test_a_step_is_in_the_form_that_backends_take() -> None:
    slopes, factors = floats(HEADS), floats(BATCH, HEADS_K)
    x = good(**append(3), **angles(rotary_interleaved=True), alibi_slopes=slopes, k_scale=floats(2), v_scale=factors)
    step = step_of(**x, window=(2**40, None), softcap=3, num_splits=7, config=Config(16, 32))
    assert step.cache == Cache(
        x["k_cache"], x["v_cache"], x["cache_seqlens"], k_scale=step.cache.k_scale, v_scale=factors
    )
    assert step.cache.k_scale.shape == (1, HEADS_K) and step.mods.alibi_slopes.shape == (1, HEADS)
    assert step.rotary == Rotary(x["rotary_cos"], x["rotary_sin"], True)
    assert step.new == 3 and step.num_splits == 7 and step.config == Config(16, 32)
    assert step.spec.causal and step.spec.left and not step.spec.right and not step.spec.raw and step.spec.softcap == 3
    assert step.positions == Positions(0, 2**30 - 2**9, 0) and step.scale == 1 / HEAD_DIM**0.5
    plain = step_of(**good(), causal=False, window=3)
    assert plain.spec.raw and plain.spec.right and plain.positions == Positions(0, 3, 3)
    assert plain.new == 0 and plain.num_splits == 0 and plain.rotary is None
    assert not step_of(**good(), scale=-1.0).spec.raw and not step_of(**good(), window=3).spec.right


def test_integers_that_lie_apart_in_memory_are_not_copied() -> None:
    column = integers(BATCH, 2)[:, 0]
    cache = step_of(**good(cache_seqlens=column, cache_batch_idx=column, cache_leftpad=column)).cache
    assert cache.seqlens is column and cache.slots is column and cache.leftpad is column
