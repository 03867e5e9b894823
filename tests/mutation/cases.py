"""The calls that mutants are shown, as data: small ones, whose features, sizes and dtype say what they are."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from flash.kernels.spec import Config
from tests import features
from tests.bounds import Inputs
from tests.features import Sizes
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


class Case(NamedTuple):
    """One call.

    Args:
        names: features of tests/features.py and of `operands.make_own`, with a space between them.
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
        far: axis along which tensors of four axes lie far apart (`slice.far_apart`).
        sigma: standard deviation of q, k and v.
        config: tile sizes.
        cut: whether it is run as four parts, of halves of its rows and keys (`tests.parts`); dense ones of float64.
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
    cut: bool = False
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


def drawn_probability() -> float:
    """A dropout_p that one of the draws of ONE is just high enough for: it must be kept."""
    seed = features.seed_of(Inputs(*[torch.zeros(1)] * 4, None, {}))
    key = np.uint64(seed % 2**32), np.uint64(seed // 2**32)
    words = philox((np.arange(ONE.seqlen_k, dtype=np.uint64), *[np.uint64(0)] * 3), key)[0]
    return float(np.sort(words)[ONE.seqlen_k // 4]) / 2**32


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
    # parts of a call
    *(Case(f"{names} causal", TWO, cut=True) for names in ("dropout_p", "score_mod", "mask_mod")),
    Case("block_mask", ONE._replace(batch=2, heads=2, heads_k=2), cut=True, config=TINY),
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
