"""The validated call of decoding: whatever is wrong with an argument of flash_attention_decode is said here or nowhere.

What is in a tensor (lengths, tables, slots) is read where the kernels run and never here: `flash.kernels.spec.Cache`
says what it should be, and a sequence that is otherwise has rows of NaN.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .checks import (
    DTYPES,
    FLOATS,
    MAX_HEAD_DIM,
    MAX_SEQLEN,
    Window,
    check_backend,
    check_equal,
    check_flag,
    check_float,
    check_scale,
    check_sinks,
    check_slopes,
    check_softcap,
    check_tensor,
    check_window,
    name_of,
)
from .kernels.spec import Cache, Config, Mods, Positions, Rotary, Spec, check_limits
from .problem import autocast, positions_of, precision_of

FLOAT8 = torch.float8_e4m3fn
# what a cache may be stored as, for each dtype of q: numbers that q's dtype holds exactly
STORED = {
    torch.float16: (torch.float16, FLOAT8),
    torch.bfloat16: (torch.bfloat16, FLOAT8),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16, FLOAT8),
    torch.float64: (torch.float64, torch.float32, torch.float16, torch.bfloat16, FLOAT8),
}


@dataclass(frozen=True)
class Step:
    """A call of decoding, checked and in the form that every backend takes.

    Args:
        q: [batch, heads, seqlen_q, head_dim].
        cache: what the sequences have, before the append.
        k: [batch, heads_k, new, head_dim] to append, or None.
        v: [batch, heads_k, new, head_dim_v], likewise.
        new: keys to append to each sequence, or that have just been appended.
        rotary: what turns q and k; None: nothing does.
        mods: optional operands of the score, of which decoding has alibi_slopes and sinks.
        spec: compile-time choices.
        scale: factor of q.k.
        positions: how far the window reaches; its q_offset is 0, the queries being each sequence's last positions.
        num_splits: parts of a sequence's keys that programs share at most; 0: chosen by the shapes.
        batch_invariant: parts are of a fixed size, whatever is beside a sequence.
        backend: "auto", "triton" or "torch".
        config: the user's Config, or None for the tuned one.
    """

    q: torch.Tensor
    cache: Cache
    k: torch.Tensor | None
    v: torch.Tensor | None
    new: int
    rotary: Rotary | None
    mods: Mods
    spec: Spec
    scale: float
    positions: Positions
    num_splits: int
    batch_invariant: bool
    backend: str
    config: Config | None

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        given: Cache,
        *,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        rotary: Rotary | None = None,
        causal: bool = True,
        window: Window = None,
        scale: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        num_splits: int | None = None,
        batch_invariant: bool = False,
        backend: str = "auto",
        config: Config | None = None,
    ) -> "Step":
        """Check the arguments of `flash.decode.flash_attention_decode` and build the Step.

        Those that say what a cache is come as a Cache and those of rotary embedding as a Rotary, yet unchecked.

        Raises:
            ValueError: an argument is wrong.
        """
        if (k is None) != (v is None):
            raise ValueError(f"k and v must be given together, got only {'k' if v is None else 'v'}")
        if k is None or v is None:
            (q,) = autocast(q)
        else:
            q, k, v = autocast(q, k, v)
        check_query(q)
        batch, heads, _, head_dim = q.shape
        check_caches(q, given.k, given.v)
        heads_k = given.k.shape[1]
        slots = slots_of(q, given.k, given.v, given.table)
        for name, flag in (("causal", causal), ("batch_invariant", batch_invariant)):
            check_flag(name, flag)
        if given.slots is None and slots < batch:
            whose = "k_cache" if given.table is None else "block_table"
            raise ValueError(f"{whose} must have a slot for each of q's batch {batch} sequences, got {slots}")
        new = 0
        if k is not None and v is not None:
            check_appended(q, k, v, given.k, given.v)
            new = k.shape[2]
        cache = Cache(
            given.k,
            given.v,
            integers("cache_seqlens", given.seqlens, q),
            given.table,
            None if given.slots is None else integers("cache_batch_idx", given.slots, q),
            None if given.leftpad is None else integers("cache_leftpad", given.leftpad, q),
            None if given.k_scale is None else factors("k_scale", given.k_scale, q, heads_k),
            None if given.v_scale is None else factors("v_scale", given.v_scale, q, heads_k),
        )
        if rotary is not None:
            check_rotary(q, rotary)
        if alibi_slopes is not None:
            alibi_slopes = check_slopes(alibi_slopes, batch, heads, q.device)
        if sinks is not None:
            sinks = check_sinks(sinks, heads, q.device)
        left, right = check_window(window)
        right = None if causal else right  # 0 is tighter
        scale, softcap = check_scale(scale, head_dim), check_softcap(softcap)
        check_backend(backend)
        # a positive scale that float32 holds can wait for the exponent; any other multiplies the score
        raw = True if 1e-30 < scale < 1e30 else False  # a branch, which makes a constant of a symbolic scale
        spec = Spec(
            causal=causal,
            left=left is not None,
            right=right is not None,
            softcap=softcap,
            dropout_p=0.0,  # which torch.compile would take for dynamic as a default
            raw=raw and softcap is None and alibi_slopes is None,
            precision=precision_of(q),
        )
        return cls(
            q, cache, k, v, new, rotary, Mods(alibi_slopes=alibi_slopes, sinks=sinks), spec, scale,
            positions_of(0, left, right), check_splits(num_splits), batch_invariant, backend, check_config(config),
        )  # fmt: skip


def check_query(q: torch.Tensor) -> None:
    """Check q by itself."""
    check_tensor("q", q, q.device)
    check_float("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have 4 dimensions [batch, heads, seqlen_q, head_dim], got shape {list(q.shape)}")
    check_sizes("q", q)


def check_sizes(name: str, x: torch.Tensor) -> None:
    """Check that a tensor [.., seqlen, head_dim] is within what kernels can address."""
    if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head_dim from 1 to {MAX_HEAD_DIM}, got {x.shape[3]}")
    if x.shape[2] > MAX_SEQLEN:
        raise ValueError(f"{name} must have a seqlen of at most {MAX_SEQLEN}, got {x.shape[2]}")


def check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Check the caches against q."""
    allowed = STORED[q.dtype]
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, x, q.device)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {list(x.shape)}")
        if x.dtype not in allowed:
            expected = " or ".join(name_of(dtype) for dtype in allowed)
            raise ValueError(f"{name} must be {expected}, which {name_of(q.dtype)} of q holds, got {name_of(x.dtype)}")
        check_sizes(name, x)
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache must have dtype {name_of(k_cache.dtype)} like k_cache, got {name_of(v_cache.dtype)}")
    check_equal("k_cache", "head_dim", k_cache.shape[3], "q", q.shape[3])
    check_equal("v_cache", "heads_k", v_cache.shape[1], "k_cache", k_cache.shape[1])
    heads, heads_k = q.shape[1], k_cache.shape[1]
    if heads % heads_k if heads_k else heads:
        raise ValueError(f"k_cache must have a number of heads that divides q's {heads}, got {heads_k}")


def slots_of(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: Any) -> int:
    """How many sequences the caches have room for."""
    first, second = ("slots", "max_seqlen") if block_table is None else ("pages", "page_size")
    check_equal("v_cache", first, v_cache.shape[0], "k_cache", k_cache.shape[0])
    check_equal("v_cache", second, v_cache.shape[2], "k_cache", k_cache.shape[2])
    if block_table is None:
        return k_cache.shape[0]
    check_tensor("block_table", block_table, q.device)
    check_int32("block_table", block_table)
    if block_table.dim() != 2:
        raise ValueError(f"block_table must have shape [slots, max_pages], got {list(block_table.shape)}")
    if k_cache.shape[2] < 1:
        raise ValueError("k_cache must have a page_size of at least 1 where block_table is given, got 0")
    if block_table.shape[1] * k_cache.shape[2] > MAX_SEQLEN:
        raise ValueError(
            f"block_table must list at most {MAX_SEQLEN} positions, got {block_table.shape[1]} pages of "
            f"{k_cache.shape[2]}"
        )
    return int(block_table.shape[0])


def check_int32(name: str, x: torch.Tensor) -> None:
    """Check that a tensor holds 32-bit integers."""
    if x.dtype != torch.int32:
        raise ValueError(f"{name} must be of dtype int32, got {name_of(x.dtype)}")


def integers(name: str, x: Any, q: torch.Tensor) -> torch.Tensor:
    """An integer for each sequence, with any stride."""
    check_tensor(name, x, q.device)
    check_int32(name, x)
    if tuple(x.shape) != (q.shape[0],):
        raise ValueError(f"{name} must have shape [{q.shape[0]}] (batch), got {list(x.shape)}")
    return x  # type: ignore[no-any-return]


def factors(name: str, x: Any, q: torch.Tensor, heads_k: int) -> torch.Tensor:
    """What stored keys or values are multiplied by, [batch or 1, heads_k]."""
    check_tensor(name, x, q.device)
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {name_of(x.dtype)}")
    if tuple(x.shape) not in ((heads_k,), (q.shape[0], heads_k)):
        raise ValueError(
            f"{name} must have shape [{heads_k}] (heads_k) or [{q.shape[0]}, {heads_k}] (batch, heads_k), "
            f"got {list(x.shape)}"
        )
    return x.unsqueeze(0) if x.dim() == 1 else x  # type: ignore[no-any-return]


def check_appended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """Check new keys and values against q and the caches."""
    for name, x, cache, like in (("k", k, k_cache, "k_cache"), ("v", v, v_cache, "v_cache")):
        check_tensor(name, x, q.device)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [batch, heads_k, new, head_dim], got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have dtype {name_of(q.dtype)} like q, got {name_of(x.dtype)}")
        check_equal(name, "batch", x.shape[0], "q", q.shape[0])
        check_equal(name, "heads_k", x.shape[1], like, cache.shape[1])
        check_equal(name, "head_dim", x.shape[3], like, cache.shape[3])
        check_sizes(name, x)
        if any(stride == 0 and size > 1 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(f"{like} must have an element for each index where {name} is given, got an expanded one")
    check_equal("v", "seqlen", v.shape[2], "k", k.shape[2])


def rotary_of(cos: Any, sin: Any, interleaved: bool) -> Rotary | None:
    """The rotary embedding that a call asks for, yet unchecked; None where it asks for none."""
    check_flag("rotary_interleaved", interleaved)
    return None if cos is None and sin is None else Rotary(cos, sin, interleaved)


def check_rotary(q: torch.Tensor, rotary: Rotary) -> None:
    """Check the rotary embedding against q."""
    cos, sin, _ = rotary
    if cos is None or sin is None:
        given = "rotary_cos" if sin is None else "rotary_sin"
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got only {given}")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_tensor(name, x, q.device)
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be {FLOATS}, got {name_of(x.dtype)}")
        if x.dim() != 2 or x.shape[0] < 1 or not 1 <= x.shape[1] <= q.shape[3] // 2:
            raise ValueError(
                f"{name} must have shape [positions, pairs], at least one position and 1 to {q.shape[3] // 2} pairs "
                f"(half of head_dim {q.shape[3]}), got {list(x.shape)}"
            )
    if sin.shape != cos.shape:
        raise ValueError(f"rotary_sin must have shape {list(cos.shape)} like rotary_cos, got {list(sin.shape)}")


def check_splits(num_splits: Any) -> int:
    """The number of splits, 0 where it is to be chosen."""
    if num_splits is None:
        return 0
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
        raise ValueError(f"num_splits must be an int >= 1 or None, got {num_splits!r}")
    return num_splits


def check_config(config: Any) -> Config | None:
    """The user's Config of the one kernel that has tiles."""
    if config is None:
        return None
    if not isinstance(config, Config):
        raise ValueError(f"config must be a flash.Config or None, got {config!r}")
    check_limits("decode", config)
    return config
