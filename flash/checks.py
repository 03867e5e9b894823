"""What an argument must be: each function looks at one and returns it in its plain form, or raises and names it.

A message says the argument, what was expected and what came. `flash.problem` puts the arguments together.
"""

import math
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch

from .kernels.spec import Config, Configs, check_limits
from .twins import MaskMod, ScoreMod

BACKENDS = ("auto", "triton", "hopper", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATS = "float16, bfloat16, float32 or float64"
KERNELS = Configs._fields
HOPPER_KERNELS = {"forward": "hopper_forward", "dkdv": "hopper_backward"}  # dq's Config is delta's, a plain kernel
MAX_HEAD_DIM = 512
DENSE = "[batch, seqlen, head_dim] or [batch, heads, seqlen, head_dim]"
MAX_SEQLEN = 2**30 - 2**9  # a position, an offset and a tile together stay within 32 bits

ConfigLike = Config | Mapping[str, Config] | None
Window = int | tuple[int | None, int | None] | None


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """q, k and v as views [batch, heads, seqlen, head_dim], batch 1 where packed; whether they came without heads."""
    ranks = (2, 3) if packed else (3, 4)
    axes = "[total, head_dim] or [total, heads, head_dim]" if packed else DENSE
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.is_nested:
            raise NotImplementedError(f"{name} is nested, which only flash_attention takes; pass {name}.values()")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a strided tensor, got layout {x.layout}")
        if x.dim() not in ranks or x.dim() != q.dim():
            expected = f"{ranks[0]} or {ranks[1]} dimensions, {axes}" if x is q else f"{q.dim()} dimensions like q"
            raise ValueError(f"{name} must have {expected}, got shape {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be {FLOATS}, got {name_of(x.dtype)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have dtype {name_of(q.dtype)} like q, got {name_of(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on device {q.device} like q, got {x.device}")
    one_head = q.dim() == ranks[0]
    if one_head:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    if packed:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    length_q, length_k = ("total_q", "total_k") if packed else ("seqlen_q", "seqlen_k")
    check_equal("k", "batch", k.shape[0], "q", q.shape[0])
    check_equal("v", "batch", v.shape[0], "q", q.shape[0])
    check_equal("k", "head_dim", k.shape[3], "q", q.shape[3])
    check_equal("v", length_k, v.shape[2], "k", k.shape[2])
    heads, heads_k = q.shape[1], k.shape[1]
    check_equal("v", "heads_k", v.shape[1], "k", heads_k)
    if heads % heads_k if heads_k else heads:
        swapped = not packed and not one_head and heads > q.shape[2] and k.shape[2] and q.shape[2] % k.shape[2] == 0
        hint = "; transpose(1, 2) swaps heads and seqlen, where each is in the other's place"
        raise ValueError(
            f"k must have a number of heads that divides q's {heads}, got {heads_k}{hint if swapped else ''}"
        )
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim from 1 to {MAX_HEAD_DIM}, got {x.shape[3]}")
    for name, length, x in (("q", length_q, q), ("k", length_k, k)):
        if x.shape[2] > MAX_SEQLEN:
            raise ValueError(f"{name} must have a {length.split('_')[0]} of at most {MAX_SEQLEN}, got {x.shape[2]}")
    return q, k, v, one_head


def integer(name: str, value: Any) -> int:
    """An argument as an int of our own; an array may change after the call, and to read a tensor may wait."""
    if isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be an int, got a tensor: .item() reads one number, .tolist() several")
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be an int, got {value!r}")
    return number


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by the names of their arguments, as ints of at least 1."""
    found = {name: integer(name, size) for name, size in sizes.items()}
    for name, size in found.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return found


def check_floats(dtype: Any) -> None:
    """Check that a dtype is one, and of floats of any width."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a torch.dtype of floats, got {dtype!r}")


def check_equal(name: str, axis: str, got: int, other: str, expected: int) -> None:
    """Check that two tensors agree on an axis."""
    if got != expected:
        raise ValueError(f"{name} must have {axis} {expected} like {other}, got {got}")


def check_tensor(name: str, x: object, device: torch.device) -> None:
    """Check that x is a strided tensor on q's device."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense, strided tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.device != device:
        raise ValueError(f"{name} must be on device {device} like q, got {x.device}")


def check_float(name: str, x: torch.Tensor) -> None:
    """Check that x holds floating-point numbers of a width that is served."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be {FLOATS}, got {name_of(x.dtype)}")


def check_flag(name: str, value: object) -> None:
    """Check that a flag is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_backend(backend: object) -> None:
    """Check that a backend has a name we know."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def is_number(value: object) -> bool:
    """Whether a value is a number, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_dropout(dropout_p: Any) -> float:
    """The dropout probability."""
    if not is_number(dropout_p) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")
    return constant(dropout_p)


def constant(value: float) -> float:
    """A number as a float; torch.compile makes a constant of a symbolic float where one of its methods is called."""
    return float(value).__float__()


def check_finite(name: str, value: Any, expected: str) -> float:
    """A number as a finite float."""
    if not is_number(value) or not abs(value) < math.inf:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, got an int of {len(str(value))} digits") from None


def check_scale(scale: object, head_dim: int) -> float:
    """The scale as a finite float, head_dim ** -0.5 by default."""
    return 1.0 / math.sqrt(head_dim) if scale is None else check_finite("scale", scale, "a finite float or None")


def check_softcap(softcap: object) -> float | None:
    """The soft cap as a float that float32 holds with room for its inverse, None where there is none."""
    if softcap is None:
        return None
    cap = check_finite("softcap", softcap, "a finite float > 0 or None")
    if not cap > 0.0:
        raise ValueError(f"softcap must be a finite float > 0 or None, got {softcap!r}")
    if not 1e-30 < cap < 1e30:
        raise ValueError(f"softcap must be between 1e-30 and 1e30, got {softcap!r}")
    return constant(cap)


def check_window(window: Any) -> tuple[int | None, int | None]:
    """The window as (left, right), None where a side is unbounded."""
    pair = window if isinstance(window, tuple) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window must be an int, a tuple (left, right) or None, got {window!r}")
    for side in pair:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise ValueError(f"window must be an int, a tuple (left, right) or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"window must be >= 0 on each side (None: unbounded), got {window!r}")
    return pair


def check_q_offset(q_offset: Any, batch: int, device: torch.device) -> int | torch.Tensor:
    """The position of query 0: an int, or a dense tensor [batch]."""
    if isinstance(q_offset, torch.Tensor):
        check_tensor("q_offset", q_offset, device)
        if q_offset.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"q_offset must be of dtype int32 or int64, got {name_of(q_offset.dtype)}")
        if q_offset.dim() > 1 or (q_offset.dim() == 1 and q_offset.shape[0] != batch):
            raise ValueError(f"q_offset must have shape [] or [{batch}] (batch), got {list(q_offset.shape)}")
        return q_offset.expand(batch).contiguous()  # at most one integer per batch element
    if isinstance(q_offset, bool) or not isinstance(q_offset, int):
        raise ValueError(f"q_offset must be an int, an int tensor or None, got {q_offset!r}")
    return q_offset


def check_lengths(
    cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: object, max_seqlen_k: object, device: torch.device
) -> int:
    """Check where packed sequences start, and how long the longest are said to be; the number of sequences."""
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, cu, device)
        if cu.dtype != torch.int32:
            raise ValueError(f"{name} must be of dtype int32, got {name_of(cu.dtype)}")
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(f"{name} must have shape [batch + 1], one sequence at least, got {list(cu.shape)}")
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise ValueError(f"{name} must be an int >= 0, got {most!r}")
    check_equal("cu_seqlens_k", "length", cu_seqlens_k.shape[0], "cu_seqlens_q", cu_seqlens_q.shape[0])
    return int(cu_seqlens_q.shape[0]) - 1


def check_mask(mask: torch.Tensor, shape: Sequence[int], one_head: bool, device: torch.device) -> torch.Tensor:
    """The mask as a view of four axes."""
    check_tensor("mask", mask, device)
    if mask.dtype != torch.bool:
        hint = "use bias for a float one, which is added" if mask.is_floating_point() else "mask.bool() makes it one"
        raise ValueError(f"mask must be bool (True = attend), got {name_of(mask.dtype)}; {hint}")
    return broadcastable("mask", mask, shape, one_head)


def check_bias(bias: torch.Tensor, shape: Sequence[int], one_head: bool, device: torch.device) -> torch.Tensor:
    """The bias as a view of four axes."""
    check_tensor("bias", bias, device)
    if bias.dtype == torch.bool:
        raise ValueError("bias must be floating point, got bool; use mask for a bool one")
    check_float("bias", bias)
    return broadcastable("bias", bias, shape, one_head)


def broadcastable(name: str, x: torch.Tensor, shape: Sequence[int], one_head: bool) -> torch.Tensor:
    """x as a view of four axes, each of size 1 or that of shape [batch, heads, seqlen_q, seqlen_k]; never expanded."""
    target = (shape[0], *shape[2:]) if one_head else tuple(shape)
    sizes = (1,) * (len(target) - x.dim()) + tuple(x.shape)
    if len(sizes) > len(target) or any(size != 1 and size != n for size, n in zip(sizes, target, strict=True)):
        axes = "[batch, seqlen_q, seqlen_k]" if one_head else "[batch, heads, seqlen_q, seqlen_k]"
        hint = _from_batch(name, x.shape, target)
        raise ValueError(f"{name} must broadcast to {axes} = {list(target)}, got shape {list(x.shape)}{hint}")
    while x.dim() < len(target):
        x = x.unsqueeze(0)
    return x.unsqueeze(1) if one_head else x


def _from_batch(name: str, sizes: Sequence[int], target: Sequence[int]) -> str:
    """How to index what lacks axes behind its first, where that is the batch, as in masks of padding; or nothing."""
    missing = len(target) - len(sizes)
    full = (*sizes[:1], *(1,) * missing, *sizes[1:])
    if missing < 1 or len(sizes) < 2 or any(size not in (1, n) for size, n in zip(full, target, strict=True)):
        return ""
    return f"; {name}[{', '.join([':', *['None'] * missing])}] has batch first"


def check_slopes(slopes: torch.Tensor, batch: int, heads: int, device: torch.device) -> torch.Tensor:
    """The ALiBi slopes as a view [1 or batch, heads]."""
    check_tensor("alibi_slopes", slopes, device)
    check_float("alibi_slopes", slopes)
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape [{heads}] (heads) or [{batch}, {heads}] (batch, heads), "
            f"got {list(slopes.shape)}"
        )
    return slopes.unsqueeze(0) if slopes.dim() == 1 else slopes


def check_sinks(sinks: torch.Tensor, heads: int, device: torch.device) -> torch.Tensor:
    """The sinks, [heads]."""
    check_tensor("sinks", sinks, device)
    check_float("sinks", sinks)
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape [{heads}] (heads), got {list(sinks.shape)}")
    return sinks


def check_mod(name: str, mod: Any, shape: Sequence[int], device: torch.device) -> None:
    """Check a user function and its tensors against [batch, heads, seqlen_q, seqlen_k]; no gradient reaches those."""
    kind = ScoreMod if name == "score_mod" else MaskMod
    if not isinstance(mod, kind):
        made = f"flash.mods.{kind.__name__}(fn, torch_fn{', derivative' if kind is ScoreMod else ''}) makes one"
        raise TypeError(f"{name} must be a flash.mods.{kind.__name__}, got {type(mod).__name__}; {made}")
    for n, x in enumerate(mod.args):
        check_tensor(f"{name}.args[{n}]", x, device)
        if not x.is_contiguous():
            raise ValueError(f"{name}.args[{n}] must be contiguous, got strides {x.stride()}")
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name}.args[{n}] requires grad, and no gradient reaches a user function's tensors; detach it, or "
                "pass what is learned as bias, which has a gradient"
            )
    mod.fit(*shape)


def check_spans(spans: Any, shape: Sequence[int], device: torch.device) -> Any:
    """Check what a MaskMod's spans returned: kernels read it by address."""
    names, lengths = ("key_begin", "key_end", "query_begin", "query_end"), (shape[2], shape[2], shape[3], shape[3])
    if not isinstance(spans, tuple) or len(spans) != len(names):
        raise ValueError(f"mask_mod.spans must return flash.kernels.spec.Spans, got {type(spans).__name__}")
    for name, x, length in zip(names, spans, lengths, strict=True):
        full = (shape[0], shape[1], length)
        if not isinstance(x, torch.Tensor) or x.dtype != torch.int32 or x.device != device:
            got = name_of(x.dtype) + f" on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"mask_mod.spans must return {name} as an int32 tensor on {device}, got {got}")
        if x.dim() != 3 or any(size not in (1, whole) for size, whole in zip(x.shape, full, strict=True)):
            raise ValueError(
                f"mask_mod.spans must return {name} of shape {list(full)}, or 1 there, got {list(x.shape)}"
            )
    return spans


def check_block_mask(block_mask: Any, shape: Sequence[int], device: torch.device) -> None:
    """Check a BlockMask against [batch, heads, seqlen_q, seqlen_k]."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be a torch.nn.attention.flex_attention.BlockMask, got {type(block_mask).__name__}; "
            "its create_block_mask makes one, and mask takes a bool tensor"
        )
    lengths, expected = tuple(block_mask.seq_lengths), tuple(shape[2:])
    if lengths != expected:
        raise ValueError(f"block_mask must be made for (seqlen_q, seqlen_k) = {expected}, got {lengths}")
    got = tuple(block_mask.kv_num_blocks.shape[:-1])
    got = (1,) * (2 - len(got)) + got
    if len(got) != 2 or got[0] not in (1, shape[0]) or got[1] not in (1, shape[1]):
        raise ValueError(f"block_mask must have B in (1, {shape[0]}) and H in (1, {shape[1]}), got (B, H) = {got}")
    if block_mask.kv_num_blocks.device != device:
        raise ValueError(f"block_mask must be on device {device} like q, got {block_mask.kv_num_blocks.device}")
    block_q, block_k = block_mask.BLOCK_SIZE
    if block_q % 16 or block_k % 16:
        raise NotImplementedError(
            f"block_mask has blocks of {block_q} x {block_k}; multiples of 16 are served, such as the default 128 x 128"
        )


def check_config(config: ConfigLike, backend: str = "auto") -> tuple[Config | None, Config | None, Config | None]:
    """The user's Config of each kernel, None where there is none; a bare Config is the forward's."""
    given = {"forward": config} if isinstance(config, Config) else {} if config is None else config
    if not isinstance(given, Mapping):
        raise ValueError(f"config must be a flash.Config, a dict of them or None, got {config!r}")
    for name, value in given.items():
        if name not in KERNELS:
            raise ValueError(f"config must have keys among {', '.join(KERNELS)}, got {name!r}")
        if not isinstance(value, Config):
            raise ValueError(f"config[{name!r}] must be a flash.Config, got {value!r}")
        kernel = HOPPER_KERNELS.get(name, name) if backend == "hopper" else name
        check_limits(kernel, value, f"config[{name!r}]")
    return given.get("forward"), given.get("dkdv"), given.get("dq")


def name_of(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")
