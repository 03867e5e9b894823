"""The calls that mutants are shown: small ones, and each compares everything a mutant could change.

A case is data: the features of a call (tests/features.py), its sizes and dtype. It is run forward and backward, or in
forward mode, through the public function. What comes back must be within the bounds of the oracle (tests/bounds.py), in
float32 also about as near to it as the unchanged kernels came; it must have NaN where the oracle has it, and have cost
as many products and loaded and stored elements as before.
"""

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn.attention.flex_attention import create_block_mask

from flash import mods
from flash.kernels import bias
from flash.kernels.spec import Config
from tests import bounds, calls, features
from tests.bounds import Inputs, Outputs
from tests.features import Sizes
from tests.interpreter import memory
from tests.interpreter.poison import poison
from tests.philox import philox

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ONE = Sizes(batch=1, heads=1, heads_k=1, seqlen_q=37, seqlen_k=51, head_dim=20, head_dim_v=12)
LONG = ONE._replace(seqlen_q=67, seqlen_k=67, head_dim=16, head_dim_v=16)
MID = ONE._replace(seqlen_q=48, seqlen_k=50, head_dim=16, head_dim_v=16)
TWO = ONE._replace(batch=2, heads=4, heads_k=2, seqlen_q=7, seqlen_k=19)
PACKS = ONE._replace(heads=2, head_dim=8, head_dim_v=8, lengths=((5, 7), (0, 3), (19, 40), (4, 0)))
HOSTILE = {
    "cu_seqlens_q": torch.tensor([0, 9, 5, 20, 28], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([2, 7, 10, 50, 90], dtype=torch.int32),
}
FAR = {  # sizes of a call whose tensors can lie far apart along an axis
    "batch": ONE._replace(batch=3, heads=3, heads_k=3, seqlen_q=7, seqlen_k=7, head_dim=16, head_dim_v=16),
    "head": ONE._replace(batch=3, heads=3, heads_k=3, seqlen_q=7, seqlen_k=7, head_dim=16, head_dim_v=16),
    "row": ONE._replace(seqlen_q=3, seqlen_k=3, head_dim=16, head_dim_v=16),
    "tile": ONE._replace(seqlen_q=36, seqlen_k=36, head_dim=16, head_dim_v=16),
    "column": ONE._replace(seqlen_q=3, seqlen_k=3, head_dim=16, head_dim_v=16),
    "dim": ONE._replace(seqlen_q=16, seqlen_k=16, head_dim=3, head_dim_v=3),
}


def operand(x: torch.Tensor, axes: str) -> torch.Tensor:
    """x [batch, heads, seqlen_q, seqlen_k] with every axis that is not among `axes` (of "bhqk") cut to 1."""
    for axis, letter in enumerate("bhqk"):
        if letter not in axes:
            x = x.narrow(axis, 0, 1)
    return x.clone()


def make_own(name: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Features that only mutants need: operands of any shape ("bias:hq", "mask:k"), bias of any dtype, our own mods."""
    name, _, detail = name.partition(":")
    batch, seqlen_q, seqlen_k = features.lengths_of(sizes)
    scores = torch.randn(batch, sizes.heads, seqlen_q, seqlen_k)
    if name == "mask":
        mask = operand(scores, detail) > -1.0
        mask[..., 5:8] = "k" not in detail
        return {"mask": mask}
    if name == "bias":
        return {"bias": operand(scores, detail).to(FLOAT64 if dtype == FLOAT64 else FLOAT32)}
    if name == "lowest":  # hides all keys of row 2; what is one step above it does not, as key 4 of row 3 shows
        bias = scores[:1, :1].to(getattr(torch, detail))
        lowest = torch.tensor(torch.finfo(bias.dtype).min, dtype=bias.dtype)
        bias[..., 2:4, :] = bias[..., ::7] = lowest
        bias[..., 3, 4] = torch.nextafter(lowest, -lowest)
        return {"bias": bias}
    if name == "walled":
        walls = torch.arange(seqlen_q) % 9 == 2, torch.arange(seqlen_k) % 9 == 5
        args = tuple(wall.to(torch.int32) for wall in walls)
        return {"score_mod": mods.ScoreMod(walled_score, walled_twin, walled_derivative, args)}
    if name == "document":
        ids = torch.arange(max(seqlen_q, seqlen_k)) // 7 + torch.arange(batch)[:, None]
        return {"mask_mod": mods.document(ids[:, :seqlen_q], ids[:, :seqlen_k] + int(detail or 0))}
    if name == "shared":  # tables without an axis for the batch, or the heads
        ids = torch.arange(max(seqlen_q, seqlen_k)) // 5
        table = mods.relative_position(torch.randn(9), 4)
        return {"mask_mod": mods.document(ids[:seqlen_q], ids[:seqlen_k]), "score_mod": table}
    if name == "prefix_lm":
        return {"mask_mod": mods.prefix_lm(torch.arange(batch) * 4 + 5)}
    if name == "dilated_window":
        return {"mask_mod": mods.dilated_window(2, 3)}
    if name == "neighborhood_2d":
        return {"mask_mod": mods.neighborhood_2d(5, 6, 1)}
    if name == "relative_position":
        return {"score_mod": mods.relative_position(torch.randn(sizes.heads, 9), 4)}
    if name == "alibi":
        return {"score_mod": mods.alibi(torch.rand(batch, sizes.heads))}
    if name == "tanh_softcap":
        return {"score_mod": mods.tanh_softcap(float(detail))}
    if name == "unseen":  # the first sequence sees nothing
        return {"mask": torch.arange(batch)[:, None, None, None] > torch.zeros(seqlen_k)}
    if name == "blocks":  # "32x64": blocks of 32 queries and 64 keys
        size_q, size_k = map(int, detail.split("x"))
        shape = batch, sizes.heads, seqlen_q, seqlen_k
        return {"block_mask": create_block_mask(sieve, *shape, device="cpu", BLOCK_SIZE=(size_q, size_k))}
    if name == "below":  # blocks of so many queries and keys, most of them whole or empty
        shape = None, None, seqlen_q, seqlen_k
        made = create_block_mask(lambda b, h, i, j: j <= i, *shape, device="cpu", BLOCK_SIZE=int(detail))
        return {"block_mask": made}
    raise ValueError(name)


@triton.jit
def walled(i, j, args):
    rows, cols = args
    return (tl.load(rows + i) != 0) | (tl.load(cols + j) != 0)


@triton.jit
def walled_score(s, b, h, i, j, args):
    return tl.where(walled(i, j, args), float("-inf"), s)


@triton.jit
def walled_derivative(s, b, h, i, j, args):
    return tl.where(walled(i, j, args), 0.0, 1.0)


def walled_twin(s: Any, b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    """A score that hides keys, without saying so as a mask does: some queries from all, and all from some queries."""
    rows, cols = args
    return s.masked_fill((rows[i] != 0) | (cols[j] != 0), -math.inf)


def sieve(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A rule with whole blocks of 16, partial ones and empty ones, other ones in each head and batch element."""
    return ((i // 16 + j // 16 + b + h) % 3 != 0) & (((i // 16 + h) % 2 == 0) | ((5 * i + j + b) % 4 != 0))


def drawn_probability() -> float:
    """A dropout_p that one of the draws of ONE is just high enough for: it must be kept."""
    seed = features.seed_of(Inputs(*[torch.zeros(1)] * 4, None, {}))
    key = np.uint64(seed % 2**32), np.uint64(seed // 2**32)
    words = philox((np.arange(ONE.seqlen_k, dtype=np.uint64), *[np.uint64(0)] * 3), key)[0]
    return float(np.sort(words)[ONE.seqlen_k // 4]) / 2**32


class Case(NamedTuple):
    """One call.

    Args:
        names: features of tests/features.py and of `make_own`, with a space between them.
        sizes: of the call.
        dtype: of q, k and v.
        options: further keywords.
        needs: operands whose gradient is asked for; None is every one.
        dlse: whether lse has a gradient.
        tangents: operands that have a tangent, with a space between them, or "all"; such a case is run in forward mode
            and has no backward pass.
        planted: "hidden" puts NaN into every key and value that no query sees, "seen" some into each of q, k, v and do,
            and both into their tangents, of v a whole row; "whole" rounds q and k to whole numbers: their products are
            exact, and what is lost after them shows.
        far: axis along which tensors of four axes lie far apart (`far_apart`).
        sigma: standard deviation of q, k and v.
        config: tile sizes.
        patches: numbers of kernels/bias.py, which deal out work by size.
    """

    names: str = ""
    sizes: Sizes = ONE
    dtype: torch.dtype = FLOAT64
    options: Mapping[str, Any] = {}
    needs: tuple[str, ...] | None = None
    dlse: bool = True
    tangents: str = ""
    planted: str = ""
    far: str = ""
    sigma: float = 1.0
    config: Any = features.TILES
    patches: Mapping[str, int] = {}

    @property
    def tells(self) -> str:
        """The change that the case is made for."""
        return ".to(tl.int64) dropped" if self.far else ""

    @property
    def name(self) -> str:
        """What sets the case apart."""
        told = []
        for field, value, default in zip(self._fields, self, Case(), strict=True):
            if field == "config":
                value = default if value == default else "/".join(f"{c.block_m}x{c.block_n}" for c in value.values())
            if field == "sizes":
                told += [f"{k}={v}" for k, v in value._asdict().items() if v != getattr(ONE, k)]
            elif value != default:
                told.append(str(value) if field in ("names", "dtype") else f"{field}={value}")
        return " ".join(told).replace("torch.", "") or "plain"


WIDE = {"forward": Config(16, 32, 4, 1), "dkdv": Config(32, 16, 4, 1), "dq": Config(16, 32, 4, 1)}
TINY = {"forward": Config(16, 16, 4, 1), "dkdv": Config(16, 16, 4, 1), "dq": Config(16, 16, 4, 1)}
AHEAD = {**TINY, "forward": Config(16, 16, 4, 1, ahead=True)}
FARTHEST = 2**30 - 2**9
HEAVY = {"bias": torch.full((1, 1, 1, 1), 5793.0), "sinks": torch.tensor([5797.0])}
ALIGNED = [(14, 28), (15, 29), (16, 30), (17, 31), (28, 14), (29, 15), (30, 16), (31, 17)]  # with the edges of tiles

CASES = [
    Case(),
    Case("causal"),
    Case(sizes=ONE._replace(seqlen_q=1, seqlen_k=1)),
    Case("causal", ONE._replace(seqlen_q=1)),
    Case("window", ONE._replace(seqlen_q=1, seqlen_k=1)),
    Case("causal", TWO, BFLOAT16),
    Case("q_offset", TWO),
    Case("causal", dtype=FLOAT32),
    Case("causal", ONE._replace(seqlen_q=51, seqlen_k=37), config=WIDE),
    Case("causal", LONG._replace(seqlen_q=64, seqlen_k=64), FLOAT16),
    Case("causal", LONG, FLOAT32, sigma=16.0),
    Case(options={"scale": -0.3}, dtype=FLOAT32),
    Case("causal", LONG, FLOAT32, options={"bias": torch.full((1, 1, 1, 1), 4096.0)}, planted="whole"),
    Case(sizes=ONE._replace(seqlen_k=1), dtype=FLOAT32, sigma=16.0),  # lse is the score: their difference is exactly 0
    Case("causal", options={"q_offset": -20}, planted="hidden"),
    Case("causal", planted="seen"),
    Case("causal", dtype=BFLOAT16, planted="seen"),
    Case("causal", TWO, needs=("q",), dlse=False),
    Case("causal", TWO, needs=("k",)),
    Case("causal", TWO, needs=("v",), dlse=False),
    Case("causal", TWO._replace(batch=3), options={"q_offset": torch.tensor([2**40, -(2**40), 10])}),
    *(Case("causal", FAR[axis], BFLOAT16, far=axis) for axis in ("batch", "head", "row", "tile", "dim")),
    Case(sizes=MID, config=AHEAD),
    Case("causal", LONG, FLOAT16, config=AHEAD),
    Case("softcap window", LONG, options={"window": (40, 25), "q_offset": 45}, config=AHEAD, planted="hidden"),
    # windows
    Case("window", planted="hidden", options={"q_offset": 3}),
    Case("window", ONE._replace(seqlen_q=51, seqlen_k=37), config=WIDE),
    Case(sizes=LONG, options={"window": (40, 25)}),
    Case(sizes=LONG, options={"window": (25, 40)}, config=WIDE),
    Case("causal", LONG, options={"window": (20, None)}, config=TINY),
    *(Case(sizes=MID, options={"window": window}, config=TINY) for window in ALIGNED),
    *(Case("causal", MID, options={"q_offset": offset}, config=TINY) for offset in (-2, -1, 1, 14, 15, 16)),
    *(Case("causal", MID, options={"window": (left, 0)}, config=WIDE) for left in (29, 30, 31, 32)),
    Case(options={"window": (None, 5)}),
    Case(options={"window": (0, 0)}),
    *(Case("window", options={"q_offset": offset}) for offset in (60, -50)),  # every key is out of reach
    Case(options={"window": (FARTHEST, None), "q_offset": FARTHEST}),
    Case(options={"window": (None, FARTHEST), "q_offset": -FARTHEST}),
    Case("q_offset", TWO, options={"window": (3, 1)}),
    # masks and biases
    Case("mask"),
    Case("mask:hk", planted="hidden"),
    Case("padding", TWO._replace(heads=2), planted="hidden"),
    Case("padding causal", ONE._replace(batch=2), config=WIDE),
    Case("unseen", TWO),
    *(Case(f"mask:{axes}", TWO) for axes in ("bhqk", "hk", "bq", "")),
    Case("bias", planted="hidden"),
    Case("bias", FAR["row"], BFLOAT16),
    *(Case(f"bias:{axes}", TWO, patches={"PROGRAMS": 8}) for axes in ("bhqk", "k", "hq", "b", "qk")),
    Case("bias:hk causal", TWO._replace(batch=3, seqlen_q=20), patches={"PROGRAMS": 10, "STRIPS": 1}),
    Case("bias:hk", TWO._replace(batch=3), patches={"PROGRAMS": 16}),  # two parts of three pairs: the last is short
    Case("bias:bk", TWO._replace(heads=3, heads_k=1), patches={"PROGRAMS": 8}),
    Case("bias:k", ONE._replace(batch=2, seqlen_q=70, seqlen_k=19), patches={"PROGRAMS": 4, "STRIPS": 2}, config=TINY),
    Case("bias:q window", ONE._replace(batch=3), patches={"PROGRAMS": 4}),
    Case("bias:qk window", MID, config=TINY),
    Case("bias:qk", dtype=FLOAT32),
    Case("bias:bhqk", TWO._replace(heads=2, seqlen_q=18, seqlen_k=19), config=TINY),
    Case("bias:qk causal", LONG, needs=("bias",), dlse=False),
    *(Case(f"lowest:{dtype}", ONE._replace(seqlen_k=19)) for dtype in ("float16", "bfloat16", "float32", "float64")),
    Case("mask:bhqk bias:bhqk", FAR["batch"], BFLOAT16, far="batch"),
    Case("mask:bhqk bias:bhqk", FAR["head"], BFLOAT16, far="head"),
    Case("mask:bhqk bias:bhqk", FAR["row"], BFLOAT16, far="row"),
    Case("mask:q bias:q", FAR["row"], BFLOAT16, far="row"),
    Case("mask:qk bias:qk", FAR["column"], BFLOAT16, far="column"),
    Case("mask:k bias:k", FAR["column"], BFLOAT16, far="column"),
    # what changes the score
    Case("alibi_slopes"),
    Case("alibi_slopes causal window", TWO),
    Case("alibi_slopes mask:hk", dtype=BFLOAT16, planted="hidden"),
    Case("alibi_slopes", TWO, FLOAT32, needs=("alibi_slopes",)),
    Case("softcap"),
    Case(options={"softcap": 50.0}, dtype=FLOAT32),
    Case("softcap causal", LONG, FLOAT32),
    Case("softcap bias", dtype=FLOAT16, sigma=2.0),
    Case("softcap", sigma=4.0, options={"scale": -0.3}),
    Case("sinks"),
    Case("sinks causal", TWO, BFLOAT16),
    Case("sinks causal", options={"q_offset": -20}),
    Case("sinks causal", options={"q_offset": -20, "sinks": torch.tensor([-math.inf], dtype=FLOAT64)}),
    Case("dropout_p"),
    Case(options={"dropout_p": drawn_probability()}),
    Case("dropout_p causal", TWO, FLOAT32),
    Case("dropout_p bias:k", TWO, patches={"PROGRAMS": 4}),
    # user functions
    Case("score_mod"),
    Case("score_mod softcap bias alibi_slopes", TWO, patches={"PROGRAMS": 4}),
    Case("score_mod causal", dtype=FLOAT32),
    Case("walled"),
    Case("walled mask:hk", dtype=FLOAT32),
    Case("mask_mod"),
    Case("prefix_lm", ONE._replace(seqlen_q=7), planted="hidden"),
    Case("mask_mod", TWO, BFLOAT16),
    Case("document", ONE._replace(batch=2), config=TINY),
    Case("document:2", planted="hidden"),
    Case("shared", TWO._replace(heads=2)),
    Case("prefix_lm", TWO._replace(seqlen_q=19)),
    Case("dilated_window", config=TINY),
    Case("neighborhood_2d", config=TINY),
    Case("relative_position", TWO),
    Case("relative_position", dtype=FLOAT32),
    Case("alibi", TWO),
    Case("alibi", dtype=FLOAT32),
    Case("tanh_softcap:1.5", sigma=2.0),
    Case("tanh_softcap:50", dtype=FLOAT32),
    Case("tanh_softcap:0.1", dtype=FLOAT32, sigma=8.0),
    Case("tanh_softcap:1.5", sigma=0.1, options={"bias": torch.full((1, 1, 1, 1), 1.75, dtype=FLOAT64)}),
    Case("tanh_softcap:1.5", dtype=FLOAT32, sigma=2.0),
    # block masks
    Case("block_mask", config=TINY),
    Case("blocks:16x16", ONE._replace(batch=2, heads=2), config=TINY),
    Case("block_mask", LONG._replace(seqlen_q=20), config=TINY, planted="hidden"),
    Case("below:16", LONG, config=AHEAD),  # whole blocks, read ahead
    Case("blocks:32x64", LONG, config=TINY),
    Case("blocks:16x1024", config=TINY),
    Case("blocks:32x64", LONG, config=TINY, planted="seen"),
    Case("blocks:64x32 causal", LONG, config=TINY),
    Case("blocks:32x32 mask:qk sinks", ONE, FLOAT32, config=TINY),
    # packed sequences
    Case("packed", PACKS),
    Case("packed causal", PACKS, BFLOAT16),
    Case("packed window alibi_slopes", PACKS, config=WIDE),
    Case("packed q_offset mask bias", PACKS),
    Case("packed bias:k sinks", PACKS, patches={"PROGRAMS": 4}),
    Case("packed dropout_p score_mod", PACKS),
    Case("packed block_mask", PACKS, config=TINY),
    Case("packed causal groups", PACKS, planted="hidden"),
    Case("packed causal", PACKS, planted="seen"),
    Case("packed bias:bh alibi_slopes", PACKS, options=HOSTILE, patches={"PROGRAMS": 16}),
    Case("packed bias:h", PACKS, options=HOSTILE, patches={"PROGRAMS": 2}),
    # forward mode
    Case(tangents="all"),
    *(Case("causal", TWO, tangents=name) for name in ("q", "k", "v")),
    *(Case("bias alibi_slopes sinks", TWO, tangents=name) for name in ("bias", "alibi_slopes", "sinks")),
    Case("causal", TWO, BFLOAT16, tangents="all"),
    Case("causal", LONG, FLOAT16, tangents="all"),
    Case("causal", LONG, FLOAT32, tangents="all", config=WIDE),
    Case("causal", LONG, FLOAT32, tangents="all", sigma=16.0),
    Case(sizes=ONE._replace(seqlen_k=1), dtype=FLOAT32, tangents="all", sigma=16.0),
    Case("causal", ONE._replace(seqlen_q=51, seqlen_k=37), tangents="all", config=WIDE),
    Case("causal", tangents="all", options={"q_offset": -20}, planted="hidden"),
    Case("causal", tangents="all", planted="seen"),
    Case("causal", dtype=BFLOAT16, tangents="all", planted="seen"),
    Case(tangents="all", options={"window": (40, 25)}, sizes=LONG),
    Case(dtype=FLOAT32, tangents="all", options={"scale": -0.3}),
    Case("mask:hk", tangents="all", planted="hidden"),
    Case("bias", tangents="all", planted="hidden"),
    Case("bias softcap", dtype=FLOAT32, tangents="all"),
    Case("alibi_slopes causal window", TWO, tangents="all"),
    Case("softcap", sigma=4.0, tangents="all", options={"scale": -0.3}),
    Case("sinks", tangents="all"),
    Case("sinks", LONG, FLOAT32, tangents="sinks", options=HEAVY, planted="whole"),
    Case("sinks causal", TWO, BFLOAT16, tangents="all"),
    Case("sinks causal", tangents="all", options={"q_offset": -20}),
    Case("dropout_p", tangents="all"),
    Case("score_mod softcap bias alibi_slopes", TWO, tangents="all"),
    Case("blocks:32x64", LONG, tangents="all", config=TINY),
    Case("packed causal groups", PACKS, tangents="all", planted="hidden"),
    Case("packed bias:bh alibi_slopes", PACKS, tangents="all", options=HOSTILE),
]


class Prepared(NamedTuple):
    """A case with its inputs, what they must give, and what it must cost."""

    case: Case
    inputs: Inputs
    want: Outputs
    plain: Outputs
    floors: dict[str, float]
    chance: dict[str, torch.Tensor]
    work: list[Any]
    errors: dict[str, float] = {}


def place(x: torch.Tensor) -> torch.Tensor:
    return x


def inputs_of(case: Case) -> Inputs:
    """Inputs of a case, the same in every process."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    names = case.names.split()
    x = features.call_of(place, names, case.sizes, case.dtype, case.sigma)
    own = [name for name in names if name not in features.NAMES]
    for name in own:
        x = x._replace(options={**x.options, **make_own(name, case.sizes, case.dtype)})
    x = x._replace(options={**x.options, **case.options}, dlse=x.dlse if case.dlse else None)
    named = features.differentiable(x)
    moved = [name for name in named if case.tangents == "all" or name in case.tangents.split()]
    x = x._replace(tangents={name: torch.randn_like(named[name]) for name in moved} or None)
    rows = 0 if "packed" in names else 2  # the axis of queries and keys
    if case.planted == "hidden":
        weight = bounds.oracle(features.known(x._replace(do=torch.ones_like(x.do), dlse=None, tangents=None))).dv
        unseen = (weight == 0).all(-1)
        if not unseen.any():
            raise ValueError(f"{case.name}: every key is seen")
        for t in (x.k, x.v, *((x.tangents or {}).get(name) for name in "kv")):
            if t is not None:
                t[unseen] = math.nan
    elif case.planted == "whole":
        x = x._replace(q=x.q.round(), k=x.k.round())
    elif case.planted == "seen":
        for t, part in ((x.q, 0.33), (x.k, 0.5), (x.v, 0.2), (x.v, 0.83), (x.do, 0.25)):
            t.select(rows, int(t.shape[rows] * part))[..., -1] = math.nan
        for name, part in (("q", 0.1), ("k", 0.9), ("v", 0.7)) if x.tangents else ():
            t = x.tangents[name]
            t.select(rows, int(t.shape[rows] * part))[..., 0 if name == "v" else -1 :] = math.nan
    return x


def prepare(case: Case) -> Prepared:
    """Run a case unchanged, and keep what mutants are compared with; raises where it is wrong."""
    x = inputs_of(case)
    known = features.known(x)
    want = bounds.oracle(known)
    sound = known._replace(**{name: getattr(known, name).nan_to_num(0.0) for name in ("q", "k", "v", "do")})
    if known.tangents is not None:
        sound = sound._replace(tangents={name: t.nan_to_num(0.0) for name, t in known.tangents.items()})
    plain, floors = bounds.standard(sound), bounds.floors(sound)
    chance = {} if case.dtype == FLOAT64 or case.needs == () else bounds.likely(sound)
    if case.planted == "whole":  # the largest numbers of the exponent are s and lse
        floors = {name: value * (1.0 if name == "lse" else float(want.lse.max())) for name, value in floors.items()}
    if case.far:  # bit by bit what the same numbers give side by side
        want = plain = run(Prepared(case._replace(far=""), x, want, plain, floors, chance, []))
        floors, chance = dict.fromkeys(floors, 0.0), {}
    prepared = Prepared(case, x, want, plain, floors, chance, [])
    warm(case.dtype)
    memory.launches.clear()
    got = run(prepared)
    complaint = wrong(prepared, got)
    if complaint:
        raise AssertionError(f"{case.name}: {complaint}")
    return prepared._replace(work=[*memory.launches], errors=errors_of(prepared, got))


@cache
def warm(dtype: torch.dtype) -> None:
    """Let the first call of a dtype ask its backend whether it works, which costs a launch."""
    x = torch.ones(1, 1, 1, 16, dtype=dtype)
    features.attention("triton")(x, x, x)


def far_apart(x: Inputs, axis: str) -> Inputs:
    """x with every tensor of four axes spread along one of them: "dim" is q's last axis, "column" that of operands."""
    tensors = {name: getattr(x, name) for name in ("q", "k", "v", "do") if axis != "column"}
    operands = {name: t for name, t in x.options.items() if isinstance(t, torch.Tensor) and t.dim() == 4}
    spread = {name: across(t, axis) for name, t in {**tensors, **operands}.items()}
    options = {name: spread.get(name, value) for name, value in x.options.items()}
    if x.dlse is not None and axis not in ("dim", "column"):
        tensors["dlse"] = spread["dlse"] = across(x.dlse.unsqueeze(3), axis).squeeze(3)
    return x._replace(**{name: spread[name] for name in tensors}, options=options)


def across(x: torch.Tensor, axis: str) -> torch.Tensor:
    """A tensor spread along an axis; the last one has two names."""
    if axis in ("dim", "column"):
        return calls.far_apart(x.mT, "row", x.device).mT
    return calls.far_apart(x, axis, x.device)


def run(prepared: Prepared) -> Outputs:
    """Outputs, and gradients or tangents, of a case by the kernels as they now are."""
    case, x, *_ = prepared
    if x.tangents is not None:
        return bounds.tangents_of(features.attention("triton", case.config), x)
    if case.far:  # made anew each time: a process with so much memory to its name cannot fork
        x = far_apart(x, case.far)
    named = features.differentiable(x)
    wanted = [name for name in named if case.needs is None or name in case.needs]
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in named.items()}
    options = {**x.options, **{name: t for name, t in leaves.items() if name not in "qkv"}}
    with patched(case.patches):
        o, lse = features.attention("triton", case.config)(leaves["q"], leaves["k"], leaves["v"], **options)
        outputs, gradients = ((o,), (x.do,)) if x.dlse is None else ((o, lse), (x.do, x.dlse))
        found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], gradients)
    return Outputs(o.detach(), lse.detach(), **{f"d{name}": t for name, t in zip(wanted, found, strict=True)})


@contextmanager
def patched(numbers: Mapping[str, int]) -> Iterator[None]:
    """Other numbers in kernels/bias.py for a while."""
    stock = {name: getattr(bias, name) for name in numbers}
    vars(bias).update(numbers)
    try:
        yield
    finally:
        vars(bias).update(stock)


def check(prepared: Prepared) -> str:
    """What is wrong with a case by the kernels as they now are; empty where nothing is."""
    memory.launches.clear()
    complaint = wrong(prepared, run(prepared))
    if complaint:
        return complaint
    return "" if memory.launches == prepared.work else f"costs {memory.launches}, not {prepared.work}"


def errors_of(prepared: Prepared, got: Outputs) -> dict[str, float]:
    """The mean error of each output of a float32 case."""
    if prepared.case.dtype != FLOAT32:
        return {}
    pairs = {name: (getattr(got, name), getattr(prepared.want, name)) for name in Outputs._fields}
    errors = {name: (x - y).nan_to_num(0.0) for name, (x, y) in pairs.items() if x is not None}
    return {name: float(bounds.rms(error)) for name, error in errors.items()}


def wrong(prepared: Prepared, got: Outputs) -> str:
    """The first output that is not what the oracle says."""
    for name in Outputs._fields:
        tensors = [getattr(t, name) for t in (got, prepared.want, prepared.plain)]
        if tensors[0] is None:
            continue
        lost = [t.isnan() for t in tensors]
        if not torch.equal(lost[0], lost[1]):
            return f"{name} has NaN in other places"
        tensors = [t.detach().masked_fill(lost[1] | lost[2], 0.0) for t in tensors]
        dtype = bounds.rule_of(name, prepared.inputs)
        for line in bounds.judge(*tensors, dtype, prepared.floors[name], prepared.chance.get(name)):
            return f"{name} {line}"
    for name, error in errors_of(prepared, got).items():
        if error > 1.5 * prepared.errors.get(name, error):
            return f"{name} is {error / prepared.errors[name]:.1f} times as wrong as it was"
    return ""


def watch_allocations() -> None:
    """Fill what the library allocates with the mark that the memory checker knows; for the whole process."""

    def watched(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = stock(*args, **kwargs)
            module = sys._getframe(1).f_globals.get("__name__", "")
            return poison(x) if module.startswith("flash.") and x.device.type == "cpu" else x

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, watched(getattr(torch, name)))
    torch.Tensor.new_empty = watched(torch.Tensor.new_empty)  # type: ignore[method-assign, assignment]
