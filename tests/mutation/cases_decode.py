"""The calls of decoding that mutants are shown, as data: two sequences in a cache, small tiles, and what they ask for.

Keys that no query may see are NaN, pages of nobody are numbers without a page, so that most of what reads too much is
told by its result; the rest by the number of elements that are read.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from flash.kernels.spec import Config

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
FLOAT8 = torch.float8_e4m3fn
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
TILE = Config(16, 16, 4, 1)


class Case(NamedTuple):
    """One call of `flash_attention_decode`.

    Args:
        names: keys of FEATURES, with a space between them.
        lengths: keys of each sequence, the new ones among them.
        seqlen_q: queries of each sequence.
        page_size: None for a dense cache.
        new: keys appended to each sequence.
        dtype: of q.
        stored: of the cache; None is dtype.
        sizes: further sizes, as `decoding.random_call` names them.
        options: further keywords of the call.
        told: for a tensor of the call, what some of its elements say in place of the truth, by their flat index.
        planted: "seen" puts NaN into a query, and into a key and values that some queries see; "bytes" every float8
            into the first values; "edges" into new values what float8 rounds this way and that, "nan" some NaN;
            "filled" a number wherever nobody should look; "tight" leaves no page to spare;
            "level" makes all scores large, nearly the same, and exact.
        far: a tensor of the call and its axis along which elements lie so far apart that offsets pass 32 bits.
        config: of the decode kernel.
        patches: numbers of autotune/decoding.py.
    """

    names: str = ""
    lengths: tuple[int, ...] = (37, 20)
    seqlen_q: int = 1
    page_size: int | None = None
    new: int = 0
    dtype: torch.dtype = FLOAT64
    stored: torch.dtype | None = None
    sizes: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    told: Mapping[str, Mapping[int, int]] = {}
    planted: str = ""
    far: tuple[str, int] | None = None
    config: Config = TILE
    patches: Mapping[str, int] = {}

    @property
    def tells(self) -> str:
        """The change that the case is made for."""
        return ".to(tl.int64) dropped" if self.far else ""

    @property
    def name(self) -> str:
        """What sets the case apart."""
        told = [self.names] if self.names else []
        for field, value, default in zip(self._fields[1:], self[1:], Case()[1:], strict=True):
            if value != default:
                told.append(f"{value.block_m}x{value.block_n}" if field == "config" else f"{field}={value}")
        return "decode " + (" ".join(told).replace("torch.", "") or "plain")


def sixteenths(rows: int, pairs: int, step: int) -> torch.Tensor:
    """Numbers from -1 to 1 for rotary embedding, whose products with others like them are exact."""
    return (torch.arange(rows * pairs) * step % 33 - 16).view(rows, pairs) / 16


def turns(rows: int = 48, pairs: int = 5) -> dict[str, Any]:
    return {"rotary_cos": sixteenths(rows, pairs, 7), "rotary_sin": sixteenths(rows, pairs, 13)}


FEATURES: dict[str, dict[str, Any]] = {
    "leftpad": {"cache_leftpad": torch.tensor([18, 3], dtype=torch.int32)},
    "slots": {"cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32)},
    "k_scale": {"k_scale": torch.tensor([0.7, -2.3])},
    "k_scales": {"k_scale": torch.tensor([[0.7, -2.3], [1.7, 0.3]])},
    "v_scale": {"v_scale": torch.tensor([0.7, 2.3])},
    "v_scales": {"v_scale": torch.tensor([[0.7, 2.3], [1.7, -0.3]])},
    "any": {"causal": False},
    "window": {"window": (9, 0)},
    "slopes": {"alibi_slopes": torch.tensor([[0.1, 0.2, -0.3, 0.0], [0.5, 0.4, 0.3, 0.2]])},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, -math.inf])},
    "negative": {"scale": -0.3},
    "rotary": turns(),
    "interleaved": {**turns(), "rotary_interleaved": True},
    "halves": {name: x.to(BFLOAT16) for name, x in turns().items()},
    "past": turns(19),
    "three": turns(3, 3),
    "one": turns(48, 1),
    "integers": {  # of ten sequences
        "cache_leftpad": torch.zeros(10, dtype=torch.int32),
        "cache_batch_idx": torch.arange(10, dtype=torch.int32),
    },
    "far_scales": {"k_scale": torch.arange(1, 10).view(3, 3) / 8, "v_scale": torch.arange(9, 0, -1).view(3, 3) / 8},
}
ALL = "leftpad slots k_scales v_scales window slopes softcap sinks"


def parts(number: int) -> dict[str, Any]:
    return {"num_splits": number}


INVARIANT = {"batch_invariant": True}
ONE = {"heads": 1, "heads_k": 1}
TIGHT = {**ONE, "capacity": 33}
GROUP = {"heads": 4, "heads_k": 1}
TEN = {"heads": 1, "heads_k": 1, "capacity": 7}
PADDED = torch.tensor([37, 20], dtype=torch.int32)  # no key is left
FULL = (7,) * 10  # as many as there are positions
SAID = {  # by ten sequences
    "cache_seqlens": (6, 7, 8, 0, -1, INT_MIN, INT_MAX, 7, 7, 7),
    "cache_leftpad": (6, 7, 8, 0, -1, INT_MIN, INT_MAX, 1, 2, 3),
    "cache_batch_idx": (0, 9, 10, -1, INT_MIN, INT_MAX, 5, 3, 8, 11),
}
SAID_NEW = (4, 5, 6, 0, -1, INT_MIN, INT_MAX, INT_MAX - 1, -2, 3)  # where two more come


LIES = ({0: -1, 20: 29}, {12: INT_MAX, 14: INT_MIN}, {13: -1, 21: 29})  # the last are of pages that nobody has
AFAR: dict[str, Any] = {
    "lengths": (3, 3, 3),
    "seqlen_q": 3,
    "dtype": BFLOAT16,
    "sizes": {"heads": 3, "heads_k": 3, "head_dim": 6, "head_dim_v": 3, "capacity": 3},
}


def table(entries: Mapping[int, int]) -> dict[str, Mapping[int, int]]:
    """What entries of a block table say; with pages of 3 it has 14 for each of two sequences, of 29 pages."""
    return {"block_table": entries}


def said(*numbers: int, of: str, start: int = 0) -> dict[str, dict[int, int]]:
    """What elements of a tensor say, from one on."""
    return {of: dict(enumerate(numbers, start))}


CASES = [
    Case(),
    Case(options=parts(1)),
    Case(options=parts(3)),
    Case(seqlen_q=3, options=parts(2)),
    Case(lengths=(32, 16), options=parts(2)),
    Case(lengths=(32, 16), sizes={"head_dim": 16, "head_dim_v": 16}),
    Case(lengths=(33, 15), sizes={"head_dim": 16, "head_dim_v": 16}, dtype=FLOAT32),
    Case(lengths=(0, 3), seqlen_q=5, options=parts(2)),
    Case(lengths=(37,), dtype=BFLOAT16, seqlen_q=2),
    Case(lengths=(37,), dtype=FLOAT32, options=parts(2)),
    Case(lengths=(37,), dtype=FLOAT16, page_size=16, options=parts(2)),
    Case(lengths=(37,), dtype=FLOAT32, sizes={"sigma": 8.0}, options=parts(2)),
    Case(lengths=(288,), sizes=ONE, options=parts(18)),
    Case(lengths=(288,), sizes=ONE, dtype=FLOAT32, options=parts(18)),
    Case(lengths=(60, 80), dtype=FLOAT32, planted="level", seqlen_q=4, options={"scale": 0.25, **parts(5)}),
    Case(lengths=(20, 37), seqlen_q=5, sizes=GROUP),  # two tiles of rows
    Case(lengths=(20, 37), seqlen_q=20, sizes={"heads": 3, "heads_k": 1}, options=parts(2)),
    Case(lengths=(20, 37), seqlen_q=20, sizes=ONE, config=Config(32, 32, 4, 1)),
    Case(seqlen_q=12, options=parts(3)),
    Case(lengths=(60,), sizes=ONE, options=parts(2)),
    Case("any", seqlen_q=5),
    Case("any", lengths=(33, 50), seqlen_q=20, sizes=ONE),
    Case("window", (50, 33)),
    Case("window", (50, 33), seqlen_q=5, options=parts(2)),
    Case("window any", (50, 33), seqlen_q=5),
    Case(lengths=(50, 33), seqlen_q=5, options={"window": (None, 1), "causal": False}),
    Case(lengths=(50, 33), seqlen_q=5, options={"window": (20, 2), "causal": False, "num_splits": 3}),
    Case(lengths=(70,), seqlen_q=3, options={"window": 40}, sizes=ONE),
    Case(lengths=(70,), options={"window": 40}, sizes=ONE),
    Case("window", (5,), seqlen_q=20, sizes=ONE),
    Case(lengths=(50, 70), seqlen_q=2, options=INVARIANT, patches={"INVARIANT": 32}, sizes=ONE),
    Case("sinks", (50, 33), seqlen_q=2, options=INVARIANT, page_size=16, patches={"INVARIANT": 32}),
    Case(lengths=(50,), options=INVARIANT),
    # what changes the score, and where keys lie
    *(Case(name, (37, 20), seqlen_q=2) for name in ("slopes", "softcap", "sinks", "negative")),
    Case("sinks", options=parts(2)),
    Case("sinks", (0, 20), options=parts(2)),
    Case("leftpad"),
    Case("leftpad", seqlen_q=20, sizes=GROUP),
    Case("leftpad", (37, 20), seqlen_q=3, page_size=3, options=parts(3)),
    Case("slots"),
    Case("slots", page_size=3),
    Case("k_scale", seqlen_q=2),
    Case("k_scales", options=parts(2)),
    Case("v_scale", seqlen_q=2),
    Case("v_scales", options=parts(2)),
    Case("k_scales v_scales", dtype=FLOAT32),
    Case("k_scale v_scale", dtype=BFLOAT16),
    Case(ALL, (50, 33), seqlen_q=3, page_size=3, options=parts(2)),
    # pages
    Case(page_size=3, options=parts(2)),
    Case(page_size=1, lengths=(37, 3)),
    Case(page_size=16),
    Case(page_size=16, lengths=(32, 48), options=parts(2)),
    Case(page_size=64, seqlen_q=3),
    Case(page_size=32, lengths=(70, 40)),
    Case(page_size=3, seqlen_q=3),
    Case(page_size=1, lengths=(37, 20), seqlen_q=20, sizes=ONE, options=parts(2)),
    Case(page_size=3, lengths=(60, 55), seqlen_q=5, sizes=GROUP),
    Case(page_size=8, lengths=(40,), config=Config(16, 32, 4, 1)),
    # what a cache may be stored as
    Case(stored=FLOAT8),
    Case("k_scale v_scale", stored=FLOAT8, dtype=BFLOAT16, page_size=3),
    Case(stored=BFLOAT16, dtype=FLOAT32),
    Case(stored=FLOAT16),
    Case(lengths=(1,), stored=FLOAT8, sizes={**ONE, "head_dim_v": 256}, planted="bytes"),
    Case(lengths=(1,), stored=FLOAT8, sizes={**ONE, "head_dim_v": 256}, planted="bytes", dtype=FLOAT16),
    # what is not a number stays with who sees it
    Case(lengths=(37, 40), seqlen_q=5, planted="seen"),
    Case(lengths=(37, 40), seqlen_q=5, planted="seen", options=parts(2), page_size=3),
    Case("window", (37, 40), seqlen_q=5, planted="seen", dtype=BFLOAT16),
    Case("window leftpad", (37, 40), seqlen_q=20, planted="seen", sizes=GROUP, page_size=16),
    Case(lengths=(37, 40), planted="seen"),
    # rotary embedding, and what is appended
    *(Case(name, seqlen_q=3) for name in ("rotary", "interleaved", "halves", "past", "one")),
    Case("rotary leftpad", (20, 5), seqlen_q=5, dtype=BFLOAT16),
    Case("interleaved", (37, 5), dtype=FLOAT32, sizes={"head_dim": 10}),
    Case("rotary", (37, 5), dtype=FLOAT16, sizes={"head_dim": 10}),
    *(Case(name, new=2, page_size=3) for name in ("", "rotary", "interleaved leftpad", "past leftpad", "slots")),
    *(Case(name, new=5, dtype=BFLOAT16) for name in ("rotary", "interleaved", "halves")),
    Case(new=9, seqlen_q=9),
    Case(new=20, sizes={"heads": 3, "heads_k": 3}),
    Case("rotary", new=3, dtype=FLOAT32, stored=FLOAT16),
    Case("k_scales v_scales", new=3, dtype=FLOAT32),
    Case("k_scales v_scales", new=3, page_size=1),
    Case("k_scale v_scale rotary", new=3, dtype=BFLOAT16, stored=FLOAT8),
    Case("k_scale v_scale", new=3, stored=FLOAT8),
    Case(lengths=(9,), new=9, dtype=FLOAT32, stored=FLOAT8, sizes={**ONE, "head_dim_v": 120}, planted="edges"),
    Case(lengths=(9,), new=9, dtype=FLOAT32, stored=FLOAT8, sizes={**ONE, "head_dim_v": 120}, planted="nan"),
    Case(lengths=(7,), new=9, told=said(0, of="cache_seqlens"), sizes=TEN),
    # what lies
    *(Case("integers", FULL, sizes=TEN, told=said(*SAID[of], of=of)) for of in SAID),
    *(Case("integers", FULL, sizes=TEN, told=said(*SAID[of], of=of), new=2) for of in SAID),
    Case("integers", FULL, sizes=TEN, told=said(*SAID_NEW, of="cache_seqlens"), new=2, page_size=2),
    Case("integers", FULL, sizes=TEN, told=said(*SAID["cache_batch_idx"], of="cache_batch_idx"), page_size=4),
    Case("integers", FULL, sizes=TEN, told=said(*SAID["cache_batch_idx"], of="cache_batch_idx"), page_size=4, new=3),
    *(Case(page_size=3, told=table(at), new=new, seqlen_q=2) for at in LIES for new in (0, 2)),
    *(Case(page_size=3, told=table({n: 28}), planted="filled", new=2) for n in (0, 12)),
    *(Case(page_size=3, told=table({n: 29}), planted="filled") for n in (0, 12)),
    *(Case(page_size=3, told=table({n: -1}), options=parts(3)) for n in (0, 5, 6, 12)),
    *(Case(page_size=3, told=table({n: -1}), sizes=GROUP, seqlen_q=7) for n in (0, 6, 12, 13)),
    *(Case(page_size=1, told=table({n: INT_MIN}), sizes=GROUP, seqlen_q=7) for n in (0, 15, 16, 36, 37)),
    *(Case(page_size=3, told=table({n: -1}), sizes=GROUP, seqlen_q=7, options=parts(2)) for n in (0, 6, 12)),
    *(Case("window", page_size=3, told=table({n: -1}), sizes=GROUP, seqlen_q=7) for n in (6, 7, 12)),
    Case(lengths=(37, 0), page_size=3, sizes=GROUP, seqlen_q=7),
    Case(lengths=(37, 20), page_size=3, sizes=GROUP, seqlen_q=7, options={"cache_leftpad": PADDED}),
    Case(lengths=(5,), page_size=16, sizes={**ONE, "capacity": 5}, planted="tight", seqlen_q=20),
    Case("integers rotary", FULL, sizes=TEN, told=said(*SAID["cache_leftpad"], of="cache_leftpad")),
    *(Case("leftpad", page_size=3, told=table({n: -1}), seqlen_q=2) for n in (5, 6)),
    *(Case(page_size=16, told=table({n: -1}), seqlen_q=2) for n in (0, 2)),
    *(Case(page_size=32, lengths=(70, 20), told=table({n: 7}), seqlen_q=2) for n in (0, 1, 2)),
    # offsets past 32 bits
    *(Case("three", **AFAR, far=("q", axis)) for axis in range(4)),
    *(Case(**AFAR, far=(name, axis)) for name in ("k_cache", "v_cache") for axis in range(4)),
    *(Case("three", new=3, **AFAR, far=(name, axis)) for name in ("k_cache", "v_cache", "k", "v") for axis in range(4)),
    *(Case("interleaved three", new=3, **AFAR, far=(name, 3)) for name in ("q", "k")),
    *(Case("three", new=3, **AFAR, far=(name, axis)) for name in ("rotary_cos", "rotary_sin") for axis in (0, 1)),
    *(Case(new=3, **AFAR, page_size=1, far=(name, 0)) for name in ("k_cache", "v_cache")),
    *(Case(new=3, **AFAR, page_size=1, far=("block_table", axis)) for axis in (0, 1)),
    *(Case("far_scales", new=3, **AFAR, far=(name, axis)) for name in ("k_scale", "v_scale") for axis in (0, 1)),
    *(
        Case(lengths=(33,), dtype=BFLOAT16, sizes={**ONE, "capacity": 33}, far=(name, 2))
        for name in ("k_cache", "v_cache")
    ),
]
