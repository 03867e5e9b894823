"""A call of ring_attention as one rank makes it: its shards, its keywords, and the Problems of its rows.

Tensors cross torch's op in one list and everything else as text, as in `flash/ops.py`. A Problem of a rank has some of
the rank's rows and, as stand-ins without memory, all the keys of the sequence; `flash/parts.py` makes of it the part
that sees the keys which are there.
"""

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import torch

from . import dispatch
from .checks import ConfigLike, check_config, check_window, constant, name_of
from .kernels.spec import Blocks, Config
from .parts import Extent, Extents, mod_of_part, starting, within_blocks
from .problem import Problem, sequences
from .shards import Band, Piece, Way, check_lengths, plan_of
from .twins import MaskMod, ScoreMod, from_handle, handle_of

OPERANDS = ("q_offset", "mask", "bias", "alibi_slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k")
MODS = {"score_mod": ScoreMod, "mask_mod": MaskMod}
DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")
PLAIN = (
    "causal", "window", "q_offset", "scale", "softcap", "dropout_p", "max_seqlen_q", "max_seqlen_k", "deterministic",
    "backend",
)  # fmt: skip
DEFAULTS = {"causal": False, "dropout_p": 0.0, "backend": "auto"}
MARKED = 4096  # numbers at most whose values ranks compare
KEYWORDS = (*PLAIN, *OPERANDS[1:5], *OPERANDS[6:], *MODS, "block_mask", "config")


class Setting(NamedTuple):
    """What a call says of the group, beside what it says of attention.

    Args:
        group: the group's name in torch.distributed.
        world_size: its size.
        sharding: "contiguous" or "zigzag".
        method: "auto", "ring", "all_gather" or "ulysses".
        run_check: whether ranks compare their calls and tell each other the lengths of their shards.
        learns: the names of what a gradient is asked for.
        one_length: packed queries and keys have the same cu_seqlens.
        lengths: what each rank would say (`Call.layout`), where known; None: told by run_check, or else as this rank.
        batch: which batch elements of a larger whole the shards have, as an Extent; None: all.
        heads: likewise of the query heads.
        blocks: queries and keys in a block of the block mask.
        masked: lengths (seqlen_q, seqlen_k) that the block mask is for.
    """

    group: str
    world_size: int
    sharding: str
    method: str
    run_check: bool
    learns: str = ""
    one_length: bool = False
    lengths: tuple[tuple[int, ...], ...] | None = None
    batch: tuple[int, int, int] | None = None
    heads: tuple[int, int, int] | None = None
    blocks: tuple[int, int] | None = None
    masked: tuple[int, int] = (0, 0)


class Layout(NamedTuple):
    """How a sequence lies on the ranks, as all of them know it."""

    queries: list[list[Piece]]  # of each rank
    keys: list[list[Piece]]
    needs: list[list[bool]]  # whether rank r [r] sees some key of rank s [s]
    ways: list[Way]  # how keys travel on the ring
    lengths_k: list[int]
    total_q: int
    total_k: int
    band: Band | None  # what positions say of visibility; None: it is not known here
    mask: bool  # whether the mask of some rank has an axis of queries
    bias: bool  # likewise


class Call(NamedTuple):
    """A call on the shards of one rank, [batch, heads, seqlen, head_dim]; packed sequences have a batch of 1."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tensors: dict[str, torch.Tensor]  # those of OPERANDS that are given
    plain: dict[str, Any]  # those of PLAIN that are given
    mods: dict[str, ScoreMod | MaskMod]
    config: dict[str, Config]
    setting: Setting
    blocks: Blocks | None = None  # of the whole

    @property
    def packed(self) -> bool:
        """Whether sequences lie one after the other."""
        return "cu_seqlens_q" in self.tensors

    def extents(self, rows: Extent, heads: slice | None = None) -> Extents:
        """Where rows, of all heads or some, lie in the whole; of packed sequences rows are those of the longest."""
        batch, all_heads = self.q.shape[:2]
        if self.packed:
            batch, longest = self.tensors["cu_seqlens_q"].shape[0] - 1, self.plain["max_seqlen_q"]
            rows = Extent(0, longest, longest)
        first, _, whole = self.setting.heads or (0, all_heads, all_heads)
        own = heads or slice(0, all_heads)
        of_batch = Extent(*(self.setting.batch or (0, batch, batch)))
        return Extents(of_batch, Extent(first + own.start, own.stop - own.start, whole), rows)

    def placed(self, problem: Problem, row: int | torch.Tensor, extents: Extents) -> Problem:
        """A Problem of some rows and heads, told where it lies in the whole, its block mask and the seed."""
        if self.blocks is not None:
            assert self.setting.blocks is not None
            problem = within_blocks(problem, self.blocks, self.setting.blocks)
        problem = starting(problem, extents.batch.start, extents.heads.start, row)
        return replace(problem, mods=problem.mods._replace(seed=self.tensors.get("seed")))

    def check(self) -> None:
        """Raise where this rank's arguments are wrong, whatever the others have; masks and user functions in part."""
        given = {name: x for name, x in self.tensors.items() if name not in ("mask", "bias", "seed")}
        problem = problem_of(self.q, self.k, self.v, **self.plain, **given, config=self.config or None)
        if self.setting.method != "ulysses":
            problem = replace(problem, spec=problem.spec._replace(part=True))
        if not torch.compiler.is_compiling():
            dispatch.chosen(problem)  # which raises where the backend asked for does not serve
        for name in ("mask", "bias"):
            x = self.tensors.get(name)
            if x is None:
                continue
            if self.packed:
                raise NotImplementedError(
                    f"{name} of packed sequences is not served by ring_attention: give a "
                    f"{'mask_mod' if name == 'mask' else 'score_mod'}, which sees positions within the sequence"
                )
            if x.dim() != 4 or x.shape[2] not in (1, self.q.shape[2]):
                raise ValueError(
                    f"{name} must broadcast to [batch, heads, this rank's seqlen_q, the whole seqlen_k] with seqlen_q "
                    f"{self.q.shape[2]}, got shape {list(x.shape)}"
                )

    def alike(self) -> dict[str, Any]:
        """What must be alike on all ranks, by the name that messages have for it."""
        found: dict[str, Any] = {name: getattr(self.setting, name) for name in ("sharding", "method")}
        found["what requires grad"] = self.setting.learns or "nothing"
        found["cu_seqlens_q being cu_seqlens_k, the same tensor,"] = self.setting.one_length
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            found[f"{name}'s dtype"] = name_of(x.dtype)
            found[f"{name}'s shape"] = f"[{x.shape[0]}, {x.shape[1]}, seqlen, {x.shape[3]}]"
        found |= {name: x for name, x in self.plain.items() if x != DEFAULTS.get(name)}
        for name, x in self.tensors.items():
            if name == "seed":
                continue
            free = name in ("mask", "bias")  # to have an axis of queries or not
            shape = ["seqlen_q or 1" if free and axis == 2 else str(n) for axis, n in enumerate(x.shape)]
            found[name] = f"{name_of(x.dtype)} of shape [{', '.join(shape)}]{'' if free else values_of(x)}"
        if self.blocks is not None:
            found["block_mask"] = f"of blocks {self.setting.blocks} for {self.setting.masked}"
        for name, mod in self.mods.items():
            args = ", ".join(f"{name_of(x.dtype)} {list(x.shape)}{values_of(x)}" for x in mod.args)
            found[name] = f"{handle_of(mod).partition(':')[0]}({args})"
        return found | {f"config[{name!r}]": tuple(config) for name, config in self.config.items()}

    def rows(self) -> list[bool]:
        """Whether the mask has an axis of queries, and whether the bias has one."""
        return [name in self.tensors and self.tensors[name].shape[2] != 1 for name in ("mask", "bias")]

    def layout(self, said: Sequence[Sequence[int]]) -> Layout:
        """How the sequence lies, from what each rank has said: seqlen_q, seqlen_k, and its `rows`."""
        lengths_q, lengths_k, *rows = zip(*said, strict=True)
        sharding = self.setting.sharding
        for name, lengths in (("q", lengths_q), ("k", lengths_k)):
            check_lengths(name, lengths, sharding)
        totals = sum(lengths_q), sum(lengths_k)
        if self.blocks is not None and self.setting.masked != totals:
            raise ValueError(
                f"block_mask must be made for (seqlen_q, seqlen_k) = {totals}, those of all ranks, got "
                f"{self.setting.masked}"
            )
        # where no rank has more than one row, one that has an axis of queries looks like one that has none
        single = max(lengths_q) <= 1 < totals[0]
        mask, bias = (
            any(own) or (single and name in self.tensors) for name, own in zip(("mask", "bias"), rows, strict=True)
        )
        band = self.band(*totals)
        return Layout(*plan_of(lengths_q, lengths_k, sharding, band), list(lengths_k), *totals, band, mask, bias)

    def band(self, total_q: int, total_k: int) -> Band | None:
        """What positions say of visibility."""
        left, right = check_window(self.plain.get("window"))
        right = 0 if self.plain.get("causal") else right
        if left is None and right is None:
            return Band(0, None, None)
        offset = self.plain.get("q_offset")
        if self.packed:  # of sequences that share their lengths, positions among all of them do as well
            return Band(0, left, right) if self.setting.one_length and "q_offset" not in self.given() else None
        if "q_offset" in self.tensors:
            return None
        return Band(total_k - total_q if offset is None else offset, left, right)

    def given(self) -> set[str]:
        """The names of the keywords that are given."""
        return {*self.tensors, *self.plain, *self.mods}

    def problem(self, piece: Piece, layout: Layout) -> Problem:
        """This rank's rows of a piece, and stand-ins for all keys; sinks are left out."""
        rows, row = piece.local, piece.start
        extents = self.extents(Extent(row, piece.stop - row, layout.total_q))
        q = self.q[:, :, rows]
        k, v = (x.new_empty(()).expand(*x.shape[:2], layout.total_k, x.shape[3]) for x in (self.k, self.v))
        given: dict[str, Any] = {name: x for name, x in self.tensors.items() if name not in ("sinks", "seed")}
        for name in ("mask", "bias"):
            if name in given and given[name].shape[2] > 1:
                given[name] = given[name][:, :, rows]
        for name, mod in self.mods.items():
            given[name] = mod_of_part(mod, extents)
        plain = self.plain | {"deterministic": self.plain.get("deterministic", False)}
        if self.packed:
            return self.placed(*self.packed_problem(q, k, v, row, layout, plain | given), extents)
        if "q_offset" in given:
            given["q_offset"] = given["q_offset"].long() + row
        else:
            offset = plain.get("q_offset")
            plain["q_offset"] = (layout.total_k - layout.total_q if offset is None else offset) + row
        return self.placed(problem_of(q, k, v, **plain, **given, config=self.config or None), row, extents)

    def packed_problem(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: int, layout: Layout, given: dict[str, Any]
    ) -> tuple[Problem, torch.Tensor]:
        """The Problem of rows that begin somewhere among packed sequences, and at which row of each sequence."""
        cu_seqlens_q, cu_seqlens_k = given.pop("cu_seqlens_q"), given.pop("cu_seqlens_k")
        starts_q, starts_k, bad = sequences(cu_seqlens_q, cu_seqlens_k, layout.total_q, layout.total_k)
        lengths_q = starts_q.diff()
        offset = given.pop("q_offset", None)
        offset = starts_k.diff() - lengths_q if offset is None else offset
        passed = torch.minimum((row - starts_q[:-1]).clamp(min=0), lengths_q)  # rows of each sequence before this piece
        given |= {
            "q_offset": (passed + offset).to(torch.int32),
            "cu_seqlens_q": (starts_q - row).clamp(0, q.shape[2]).to(torch.int32),
            "cu_seqlens_k": starts_k.to(torch.int32),
        }
        problem = problem_of(q, k, v, **given, config=self.config or None)
        return replace(problem, mods=problem.mods._replace(bad=bad)), passed


def values_of(x: torch.Tensor) -> str:
    """A mark of a few numbers on a CPU, which tells them from others; nothing where reading them would wait."""
    if x.device.type != "cpu" or x.numel() > MARKED or x.is_meta:
        return ""
    return (
        f", values {hashlib.sha256(bytes(x.detach().contiguous().view(-1).view(torch.uint8).tolist())).hexdigest()[:8]}"
    )


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> Problem:
    """The Problem of [batch, heads, seqlen, head_dim], packed where cu_seqlens_q is among the keywords."""
    if keywords.get("cu_seqlens_q") is not None:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    return Problem.of(q, k, v, **keywords)


def call_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting, config: ConfigLike, blocks: Blocks | None,
    **keywords: Any,
) -> Call:  # fmt: skip
    """The Call of the arguments that ring_attention was given, shards [batch, heads, seqlen, head_dim]."""
    given = {name: x for name, x in keywords.items() if x is not None}
    tensors = {name: given.pop(name) for name in OPERANDS if isinstance(given.get(name), torch.Tensor)}
    mods = {name: given.pop(name) for name in MODS if name in given}
    for name, mod in mods.items():
        if not isinstance(mod, MODS[name]):
            raise TypeError(f"{name} must be a flash.mods.{MODS[name].__name__}, got {type(mod).__name__}")
    configs = zip(("forward", "dkdv", "dq"), check_config(config, given.get("backend", "auto")), strict=True)
    plain = {name: settled(x) for name, x in given.items()}
    return Call(q, k, v, tensors, plain, mods, {name: x for name, x in configs if x is not None}, setting, blocks)


def settled(value: Any) -> Any:
    """A number, or a pair of them, as the constant that torch.compile makes of it where it was symbolic."""
    if isinstance(value, tuple):
        return tuple([settled(x) for x in value])
    if isinstance(value, float):
        return constant(value)
    return index(value) if isinstance(value, int) and not isinstance(value, bool) else value


def flatten(call: Call) -> tuple[list[torch.Tensor | None], str]:
    """What crosses an op beside q, k and v: tensors, and text."""
    tensors: list[torch.Tensor | None] = [call.tensors.get(name) for name in OPERANDS]
    tensors += () if call.blocks is None else call.blocks
    mods = []
    for name, mod in call.mods.items():
        tensors += mod.args
        mods.append((name, handle_of(mod), len(mod.args)))
    config = tuple((name, tuple(x)) for name, x in call.config.items())
    return tensors, str((tuple(call.plain.items()), tuple(mods), config, tuple(call.setting)))


@lru_cache(maxsize=256)
def read(text: str) -> tuple[Any, ...]:
    """What `flatten` wrote."""
    plain, mods, config, setting = ast.literal_eval(text)
    return dict(plain), mods, {name: Config(*x) for name, x in config}, Setting(*setting)


def unflatten(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Sequence[torch.Tensor | None], text: str
) -> Call:
    """What `flatten` took apart."""
    plain, mods, config, setting = read(text)
    named = {name: x for name, x in zip(OPERANDS, tensors, strict=False) if x is not None}
    left = iter(tensors[len(OPERANDS) :])
    blocks = None if setting.blocks is None else Blocks(*(next(left) for _ in Blocks._fields))
    found = {name: from_handle(handle, tuple(next(left) for _ in range(count))) for name, handle, count in mods}  # type: ignore[misc]
    return Call(q, k, v, named, dict(plain), found, config, setting, blocks)
