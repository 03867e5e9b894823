"""The validated call: whatever is wrong with an argument is said here or nowhere.

`Problem` is the one noun that replaces argument lists between the public function, dispatch, autograd and the kernels.
Errors name the argument, what was expected and what came: ValueError for a wrong call, NotImplementedError for a right
one that is not served yet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .kernels.spec import Config, Mods, Spec

BACKENDS = ("auto", "triton", "hopper", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = ("forward", "dkdv", "dq")
MAX_HEAD_DIM = 512
MAX_SEQLEN = 2**30 - 2**9  # a position, an offset and a tile together stay within 32 bits
LATER = ("window", "mask", "bias", "alibi_slopes", "softcap", "sinks", "score_mod", "mask_mod", "block_mask")

ConfigLike = Config | Mapping[str, Config] | None


@dataclass(frozen=True)
class Problem:
    """A call of attention, checked and in the form that every backend takes.

    Args:
        q: [batch, heads, seqlen_q, head_dim].
        k: [batch, heads_k, seqlen_k, head_dim].
        v: [batch, heads_k, seqlen_k, head_dim_v].
        mods: optional operands of the score.
        spec: compile-time choices.
        scale: factor of q.k.
        q_offset: position of query 0 among the keys, within 32 bits; Mods.q_offset stands in for it where given.
        backend: "auto", "triton", "hopper" or "torch".
        configs: for each of the kernels forward, dkdv and dq the user's Config, or None for the tuned one.
        one_head: q, k and v came as [batch, seqlen, head_dim].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mods: Mods
    spec: Spec
    scale: float
    q_offset: int
    backend: str
    configs: tuple[Config | None, Config | None, Config | None]
    one_head: bool

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = False,
        q_offset: int | torch.Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        deterministic: bool | None = None,
        backend: str = "auto",
        config: ConfigLike = None,
        **later: Any,
    ) -> "Problem":
        """Check the arguments of `flash.attention.flash_attention` and build the Problem.

        Raises:
            ValueError: an argument is wrong.
            NotImplementedError: an argument asks for what is not served yet.
        """
        for name, value in later.items():
            if name not in LATER:
                raise TypeError(f"flash_attention has no keyword {name!r}")
            if value is not None:
                raise NotImplementedError(f"{name} is not served yet on any backend; leave it out")
        q, k, v = autocast(q, k, v)
        one_head = check_tensors(q, k, v)
        check_dropout(dropout_p)
        check_flag("causal", causal)
        if deterministic is not None:
            check_flag("deterministic", deterministic)
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        configs = check_config(config)
        if one_head:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        scale = check_scale(scale, q.shape[3])
        offset, positions = check_q_offset(q_offset, q, k)
        # a positive scale that float32 holds can wait for the exponent; any other multiplies the score
        raw = True if 1e-30 < scale < 1e30 else False  # a branch, which makes a constant of a symbolic scale
        spec = Spec(causal=causal, raw=raw, precision=precision_of(q))
        return cls(q, k, v, Mods(q_offset=positions), spec, scale, offset, backend, configs, one_head)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Check ranks, dtypes, devices and shapes of q, k and v; whether they came without an axis of heads."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.is_nested:
            raise NotImplementedError(f"{name} is a nested tensor, which is not served yet; pad it to a dense one")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a strided tensor, got layout {x.layout}")
        if x.dim() not in (3, 4) or x.dim() != q.dim():
            expected = "3 or 4 dimensions" if x is q else f"{q.dim()} dimensions like q"
            raise ValueError(f"{name} must have {expected}, got shape {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {name_of(x.dtype)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have dtype {name_of(q.dtype)} like q, got {name_of(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on device {q.device} like q, got {x.device}")
    one_head = q.dim() == 3
    check_equal("k", "batch", k.shape[0], "q", q.shape[0])
    check_equal("v", "batch", v.shape[0], "q", q.shape[0])
    check_equal("k", "head_dim", k.shape[-1], "q", q.shape[-1])
    check_equal("v", "seqlen_k", v.shape[-2], "k", k.shape[-2])
    if not one_head:
        heads, heads_k = q.shape[1], k.shape[1]
        check_equal("v", "heads_k", v.shape[1], "k", heads_k)
        if heads % heads_k if heads_k else heads:
            raise ValueError(f"k must have a number of heads that divides q's {heads}, got {heads_k}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim from 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}")
    for name, x in (("q", q), ("k", k)):
        if x.shape[-2] > MAX_SEQLEN:
            raise ValueError(f"{name} must have a seqlen of at most {MAX_SEQLEN}, got {x.shape[-2]}")
    return one_head


def check_equal(name: str, axis: str, got: int, other: str, expected: int) -> None:
    """Check that two tensors agree on an axis."""
    if got != expected:
        raise ValueError(f"{name} must have {axis} {expected} like {other}, got {got}")


def check_flag(name: str, value: object) -> None:
    """Check that a flag is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_dropout(dropout_p: object) -> None:
    """Check the dropout probability; only 0 is served."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")
    if dropout_p > 0.0:
        raise NotImplementedError("dropout_p is not served yet on any backend; use 0.0")


def check_scale(scale: object, head_dim: int) -> float:
    """The scale as a finite float, head_dim ** -0.5 by default."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < math.inf:
        raise ValueError(f"scale must be a finite float or None, got {scale!r}")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError(f"scale must be a finite float or None, got an int of {len(str(scale))} digits") from None


def check_q_offset(
    q_offset: int | torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> tuple[int, torch.Tensor | None]:
    """The position of query 0: an int and no tensor, or 0 and a dense tensor [batch]."""
    if q_offset is None:
        return k.shape[2] - q.shape[2], None
    if isinstance(q_offset, torch.Tensor):
        if q_offset.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"q_offset must be of dtype int32 or int64, got {name_of(q_offset.dtype)}")
        if q_offset.dim() > 1 or (q_offset.dim() == 1 and q_offset.shape[0] != q.shape[0]):
            raise ValueError(f"q_offset must have shape [] or [{q.shape[0]}] (batch), got {list(q_offset.shape)}")
        if q_offset.device != q.device:
            raise ValueError(f"q_offset must be on device {q.device} like q, got {q_offset.device}")
        return 0, q_offset.expand(q.shape[0]).contiguous()  # at most one integer per batch element
    if isinstance(q_offset, bool) or not isinstance(q_offset, int):
        raise ValueError(f"q_offset must be an int, an int tensor or None, got {q_offset!r}")
    return min(max(q_offset, -MAX_SEQLEN), MAX_SEQLEN), None


def check_config(config: ConfigLike) -> tuple[Config | None, Config | None, Config | None]:
    """The user's Config of each kernel, None where there is none; a bare Config is the forward's."""
    given = {"forward": config} if isinstance(config, Config) else {} if config is None else config
    if not isinstance(given, Mapping):
        raise ValueError(f"config must be a flash.Config, a dict of them or None, got {config!r}")
    for name, value in given.items():
        if name not in KERNELS:
            raise ValueError(f"config must have keys among {', '.join(KERNELS)}, got {name!r}")
        if not isinstance(value, Config):
            raise ValueError(f"config[{name!r}] must be a flash.Config, got {value!r}")
        limits = {
            "block_m": (16, 32, 64, 128, 256),
            "block_n": (16, 32, 64, 128, 256),
            "num_warps": (1, 2, 4, 8, 16),
            "num_stages": tuple(range(1, 9)),
        }
        for field, allowed in limits.items():
            got = getattr(value, field)
            if type(got) is not int or got not in allowed:
                raise ValueError(f"config[{name!r}].{field} must be one of {allowed}, got {got!r}")
    return given.get("forward"), given.get("dkdv"), given.get("dq")


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v in autocast's dtype where it is on; float64 stays, as in scaled_dot_product_attention."""
    for name, x in zip("qkv", tensors, strict=True):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def precision_of(q: torch.Tensor) -> str:
    """How float32 tiles are multiplied: tf32 only where the user's torch setting allows it."""
    if q.dtype != torch.float32 or q.device.type != "cuda" or torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def name_of(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")
