"""Features as data: what each adds to a call, so that tests take them alone, in pairs and in threes.

A feature is a name and a function that makes its keywords of `flash_attention` for the sizes of a call. "packed" packs
the same call for `flash_attention_varlen`, "groups" lets query heads share a key head.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flash.attention import flash_attention, flash_attention_varlen
from flash.kernels.spec import Config
from flash.mods import MaskMod, ScoreMod
from tests.bounds import Inputs, Outputs, differentiate
from tests.calls import Place, random_inputs
from tests.philox import dropout_mask

SEED = 20  # of torch's generator at the start of a call, so that the drawn dropout is known
BACKENDS = ["torch", "triton"]
TILES = {"forward": Config(32, 16, 4, 1), "dkdv": Config(16, 32, 4, 1), "dq": Config(32, 16, 4, 1)}
BLOCK = 16  # the smallest block of a block mask that every backend serves


class Sizes(NamedTuple):
    """Sizes of a call; lengths where it is packed, one pair a sequence."""

    batch: int = 2
    heads: int = 2
    heads_k: int = 2
    seqlen_q: int = 19
    seqlen_k: int = 23
    head_dim: int = 8
    head_dim_v: int = 8
    lengths: tuple[tuple[int, int], ...] = ()


SIZES = Sizes()
PACKED = ((5, 7), (0, 3), (9, 8), (4, 0))


@triton.jit
def bent_score(s, b, h, i, j, args):
    weights, step = args
    return s + tl.load(weights + h).to(s.dtype) * s * s + tl.load(step).to(s.dtype) * (i - j + b)


@triton.jit
def bent_derivative(s, b, h, i, j, args):
    weights, step = args
    return 1.0 + 2.0 * tl.load(weights + h).to(s.dtype) * s


def bent_twin(s: Any, b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    weights, step = args
    return s + weights[h].to(s.dtype) * s * s + step[0].to(s.dtype) * (i - j + b)


@triton.jit
def sieve(b, h, i, j, args):
    (shift,) = args
    return (7 * i + 3 * j + h + b + tl.load(shift)) % 4 != 0


def sieve_twin(b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    (shift,) = args
    return (7 * i + 3 * j + h + b + shift) % 4 != 0


def staircase(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A rule with whole blocks, partial ones and empty ones."""
    return (j // 24 <= i // 16) & ((j % 5 != i % 3) | (j < BLOCK))


@cache
def staircase_blocks(heads: int, seqlen_q: int, seqlen_k: int, device: str) -> BlockMask:
    return create_block_mask(staircase, None, heads, seqlen_q, seqlen_k, device=device, BLOCK_SIZE=BLOCK)


Maker = Callable[[Place, Sizes, torch.dtype], dict[str, Any]]


def lengths_of(sizes: Sizes) -> tuple[int, int, int]:
    """Batch, seqlen_q and seqlen_k that operands have: those of the longest sequence where packed."""
    if sizes.lengths:
        return len(sizes.lengths), *(max(pair[axis] for pair in sizes.lengths) for axis in (0, 1))  # type: ignore
    return sizes.batch, sizes.seqlen_q, sizes.seqlen_k


def make_mask(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    batch, seqlen_q, seqlen_k = lengths_of(sizes)
    mask = torch.rand(batch, 1, seqlen_q, seqlen_k) < 0.7
    mask[:, :, seqlen_q // 2 : seqlen_q // 2 + 1] = False
    return {"mask": place(mask)}


def make_padding(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    batch, _, seqlen_k = lengths_of(sizes)
    kept = torch.arange(batch).add(1).mul(seqlen_k) // (batch + 1)
    return {"mask": place((torch.arange(seqlen_k) < kept[:, None])[:, None, None])}


def make_bias(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    _, seqlen_q, seqlen_k = lengths_of(sizes)
    bias = torch.randn(1, sizes.heads, seqlen_q, seqlen_k)
    bias[0, 0, :, ::5] = float("-inf")
    return {"bias": place(bias.to(dtype))}


def make_slopes(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    slopes = 0.3 * torch.randn(lengths_of(sizes)[0], sizes.heads)
    return {"alibi_slopes": place((slopes if dtype == torch.float64 else slopes.abs()).to(dtype))}


def make_sinks(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {"sinks": place(torch.randn(sizes.heads).to(dtype))}


def make_score_mod(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    args = place(torch.linspace(-0.2, 0.3, max(sizes.heads, 1)).double()), place(torch.tensor([0.05]).double())
    return {"score_mod": ScoreMod(bent_score, bent_twin, bent_derivative, args)}


def make_mask_mod(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {"mask_mod": MaskMod(sieve, sieve_twin, (place(torch.tensor([2], dtype=torch.int32)),))}


def make_block_mask(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    seqlen_q, seqlen_k = sizes.seqlen_q, sizes.seqlen_k
    if sizes.lengths:
        seqlen_q, seqlen_k = (sum(pair[axis] for pair in sizes.lengths) for axis in (0, 1))
    device = place(torch.zeros(1)).device
    return {"block_mask": staircase_blocks(sizes.heads, seqlen_q, seqlen_k, str(device))}


def make_offsets(place: Place, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {"causal": True, "q_offset": place(torch.arange(lengths_of(sizes)[0]) * 3 - 2)}


FEATURES: dict[str, Maker] = {
    "causal": lambda *_: {"causal": True},
    "q_offset": make_offsets,
    "window": lambda *_: {"window": (4, 2)},
    "mask": make_mask,
    "padding": make_padding,
    "bias": make_bias,
    "alibi_slopes": make_slopes,
    "softcap": lambda *_: {"softcap": 1.5},
    "sinks": make_sinks,
    "dropout_p": lambda *_: {"dropout_p": 0.3},
    "score_mod": make_score_mod,
    "mask_mod": make_mask_mod,
    "block_mask": make_block_mask,
}
NAMES = [*FEATURES, "groups", "packed"]
PAIRS = [pair for pair in itertools.combinations(NAMES, 2) if set(pair) != {"mask", "padding"}]


def call_of(
    place: Place, names: Iterable[str], sizes: Sizes = SIZES, dtype: torch.dtype = torch.float64, sigma: float = 1.0
) -> Inputs:
    """Random inputs of a call with these features, and its keywords."""
    names = list(names)
    if "groups" in names:
        sizes = sizes._replace(heads=2 * sizes.heads_k)
    if "packed" in names:
        sizes = sizes._replace(lengths=sizes.lengths or PACKED)
    lse = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {}
    for name in names:
        if name in FEATURES:
            made = FEATURES[name](place, sizes, dtype if dtype == torch.float64 else torch.float32)
            options |= {
                key: options["mask"] & value if key == "mask" in options else value for key, value in made.items()
            }
    if not sizes.lengths:
        dense = {name: value for name, value in sizes._asdict().items() if name != "lengths"}
        return random_inputs(place, **dense, dtype=dtype, sigma=sigma, **options)
    cu = [torch.tensor([pair[axis] for pair in sizes.lengths]).cumsum(0) for axis in (0, 1)]
    total_q, total_k = (int(x[-1]) for x in cu)
    options |= {
        f"cu_seqlens_{side}": place(torch.cat([torch.zeros(1, dtype=torch.int32), x.to(torch.int32)]))
        for side, x in zip("qk", cu, strict=True)
    }
    options |= {f"max_seqlen_{side}": max(pair[axis] for pair in sizes.lengths) for axis, side in enumerate("qk")}
    shapes = (total_q, sizes.heads, sizes.head_dim), (total_k, sizes.heads_k, sizes.head_dim)
    q, k = (sigma * torch.randn(shape) for shape in shapes)
    v = sigma * torch.randn(total_k, sizes.heads_k, sizes.head_dim_v)
    do, dlse = torch.randn(total_q, sizes.heads, sizes.head_dim_v), torch.randn(sizes.heads, total_q)
    return Inputs(*(place(x.to(dtype)) for x in (q, k, v, do)), place(dlse.to(lse)), options)


def attention(backend: str, config: Any = TILES) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(q, k, v, **options) -> (o, lse) of the public call, dropout drawn from the same seed each time."""

    def call(*args: torch.Tensor, **options: Any) -> Any:
        torch.manual_seed(SEED)
        function: Any = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention
        fitting = config if config is None or "block_mask" not in options else within_blocks(config)
        return function(*args, return_lse=True, backend=backend, config=fitting, **options)

    return call


def within_blocks(config: dict[str, Config]) -> dict[str, Config]:
    """The same tiles, where they divide the smallest blocks."""
    return {kernel: Config(BLOCK, BLOCK, *tile[2:]) for kernel, tile in config.items()}


def run(x: Inputs, backend: str, config: Any = TILES) -> Outputs:
    """The public call, forward and backward."""
    return differentiate(attention(backend, config), x)


def seed_of(x: Inputs) -> int:
    """The key that a call draws for its dropout."""
    torch.manual_seed(SEED)
    return int(torch.randint(0, 2**63 - 1, (1,), device=x.q.device))


def known(x: Inputs) -> Inputs:
    """The same call for the oracle, which takes dropout as a mask: the one that Philox makes of the call's seed."""
    options = dict(x.options)
    dropout_p = options.pop("dropout_p", 0.0)
    if dropout_p:
        packed = "cu_seqlens_q" in options
        sizes = (x.q.shape[0], x.q.shape[1], x.q.shape[2], x.k.shape[2])
        if packed:
            batch = options["cu_seqlens_q"].numel() - 1
            sizes = (batch, x.q.shape[1], options["max_seqlen_q"], options["max_seqlen_k"])
        options["dropout_mask"] = dropout_mask(seed_of(x), dropout_p, *sizes).to(x.q.device)
    return x._replace(options=options)


def differentiable(x: Inputs) -> dict[str, torch.Tensor]:
    """The operands of a call that get a gradient, by name."""
    named = {"q": x.q, "k": x.k, "v": x.v}
    return named | {name: x.options[name] for name in ("bias", "alibi_slopes", "sinks") if name in x.options}


def of_operands(attention: Callable[..., Any], x: Inputs) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """A call as a function of its differentiable operands alone, lse of rows without keys as 0, and the operands."""
    named = differentiable(x)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = dict(zip(named, tensors, strict=True))
        q, k, v = (given.pop(name) for name in "qkv")
        o, lse = attention(q, k, v, **x.options | given)
        return o, lse.where(lse.isfinite(), 0.0)

    return function, list(named.values())


def gradcheck(x: Inputs, backend: str, config: Any = TILES) -> None:
    """Compare the gradients of o and of a finite lse, for every operand, with finite differences."""
    function, tensors = of_operands(attention(backend, config), x)
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_undefined_grad=False)


def slope(x: Inputs, got: Outputs, backend: str, config: Any = TILES) -> None:
    """Compare gradients with a finite difference along one random direction of all operands at once: two more calls."""
    assert x.do is not None and x.dlse is not None
    named = differentiable(x)
    step = {name: torch.randn_like(t) for name, t in named.items()}
    call, values, eps = attention(backend, config), [], 1e-6
    for sign in (1, -1):
        moved = {name: t + sign * eps * step[name] for name, t in named.items()}
        q, k, v = (moved.pop(name) for name in "qkv")
        o, lse = call(q, k, v, **x.options | moved)
        values.append(float((o * x.do).sum() + (lse.where(lse.isfinite(), 0.0) * x.dlse).sum()))
    found = (values[0] - values[1]) / (2 * eps)
    products = [(getattr(got, f"d{name}") * step[name]).flatten() for name in named]
    want = float(torch.cat(products).sum())
    size = float(torch.cat(products).abs().sum())
    assert abs(found - want) <= 1e-7 * (1 + size), f"finite difference {found}, gradients {want}"
