"""Features of attention whose cost is measured: which pairs each leaves visible, and what it adds to a score.

This is the mathematics alone; `bench.peers` has how each implementation is told. A case names its feature with a size
where it has one: "window 1024", "document 2048", "bias gradient".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Reach = tuple[Tensor, Tensor]

GLOBAL_KEYS = 128  # of "block mask": the keys that every query sees
DOCUMENT_SEED = 0


@dataclass(frozen=True)
class Feature:
    """One feature.

    Args:
        what: one line for the report.
        reach: (seqlen_q, seqlen_k, size) -> the first key that each query sees and one past its last, [seqlen_q] each.
        visible: (i, j, size) -> bool, in place of reach where a query's keys are no single run.
        operand: the keyword of a tensor that is made with q, k and v; "" = none.
        shape: (batch, heads, seqlen_q, seqlen_k) -> the operand's shape.
        learned: whether the operand's gradient is asked for.
        slopes: whether -slope_h |i - j| is added to the score.
        softcap: c of c * tanh(score / c).
        dropout_p: probability that a weight is dropped.
        packed: whether the tokens of a batch lie one after the other in memory, [batch * seqlen, heads, head_dim].
    """

    what: str
    reach: Callable[[int, int, int], Reach] | None = None
    visible: Callable[[Tensor, Tensor, int], Tensor] | None = None
    operand: str = ""
    shape: Callable[[int, int, int, int], tuple[int, ...]] | None = None
    learned: bool = False
    slopes: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    packed: bool = False


def everything(seqlen_q: int, seqlen_k: int, size: int = 0) -> Reach:
    """Every query sees every key."""
    return torch.zeros(seqlen_q, dtype=torch.int64), torch.full((seqlen_q,), seqlen_k)


def sliding(seqlen_q: int, seqlen_k: int, size: int) -> Reach:
    """A query sees the key at its own position and the size - 1 before it."""
    end = torch.arange(seqlen_q) + (seqlen_k - seqlen_q + 1)
    return (end - size).clamp(min=0), end.clamp(min=0)


def filled(seqlen_k: int) -> int:
    """Keys of a padded sequence that are not padding: three quarters."""
    return max(seqlen_k * 3 // 4, 1)


def padded(seqlen_q: int, seqlen_k: int, size: int = 0) -> Reach:
    """A query sees the keys that are not padding."""
    return everything(seqlen_q, filled(seqlen_k))


def document_starts(seqlen: int, size: int) -> list[int]:
    """Where documents of size / 2 to 2 * size tokens start, and the end of the last; the same at every call."""
    generator = torch.Generator().manual_seed(DOCUMENT_SEED)
    starts = [0]
    while starts[-1] < seqlen:
        length = torch.randint(max(size // 2, 1), 2 * size + 1, (), generator=generator)
        starts.append(min(starts[-1] + int(length), seqlen))
    return starts


def document_ids(seqlen: int, size: int) -> Tensor:
    """Which document each token is in, int32 [seqlen]."""
    starts = torch.tensor(document_starts(seqlen, size))
    return torch.repeat_interleave(torch.arange(len(starts) - 1, dtype=torch.int32), starts.diff())


def documents(seqlen_q: int, seqlen_k: int, size: int) -> Reach:
    """A query sees the keys of its own document; as many queries as keys."""
    starts, ids = torch.tensor(document_starts(seqlen_k, size)), document_ids(seqlen_k, size).long()
    return starts[ids], starts[ids + 1]


def three_of_four(i: Tensor, j: Tensor, size: int = 0) -> Tensor:
    """Every fourth key is hidden, others from row to row: a mask without a tile that is all visible or all hidden."""
    return (i + j) % 4 != 3


def local_and_global(i: Tensor, j: Tensor, size: int) -> Tensor:
    """Longformer's pattern (Beltagy et al. 2020, arXiv 2004.05150): near keys, and the first ones from everywhere."""
    return ((i - j).abs() <= size) | (j < GLOBAL_KEYS)


def slopes(heads: int) -> Tensor:
    """ALiBi's slopes 2 ** (-8 (h + 1) / heads), float32 [heads] (Press et al. 2022, arXiv 2108.12409)."""
    return torch.exp2(-8 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)


def pair_shape(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, ...]:
    """A number for each pair, shared by the batch."""
    return (1, heads, seqlen_q, seqlen_k)


def key_shape(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, ...]:
    """A number for each key, shared by heads and queries."""
    return (batch, 1, 1, seqlen_k)


def head_shape(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, ...]:
    """A number for each head."""
    return (heads,)


FEATURES = {
    "": Feature("nothing beside the case's own mask"),
    "window": Feature("the last SIZE keys up to a query's own position", reach=sliding),
    "padding": Feature("the last quarter of the keys is padding, bool [batch, 1, 1, seqlen_k]", reach=padded),
    "mask": Feature("one pair in four is hidden, bool [1, 1, seqlen_q, seqlen_k]", visible=three_of_four),
    "bias": Feature("bias [1, heads, seqlen_q, seqlen_k], fixed", operand="bias", shape=pair_shape),
    "bias gradient": Feature("the same bias, with its gradient", operand="bias", shape=pair_shape, learned=True),
    "key bias": Feature("bias [batch, 1, 1, seqlen_k], fixed", operand="bias", shape=key_shape),
    "key bias gradient": Feature("the same bias, with its gradient", operand="bias", shape=key_shape, learned=True),
    "alibi": Feature("ALiBi, fixed slopes", slopes=True),
    "softcap": Feature("30 tanh(score / 30)", softcap=30.0),
    "sinks": Feature("one sink for each head, with its gradient", operand="sinks", shape=head_shape, learned=True),
    "dropout": Feature("one weight in ten is dropped", dropout_p=0.1),
    "document": Feature("documents of SIZE / 2 to 2 SIZE tokens, as a function of two indices", reach=documents),
    "block mask": Feature("SIZE keys to either side and the first 128, as torch's BlockMask", visible=local_and_global),
    "varlen": Feature("the same documents, packed with cu_seqlens", reach=documents, packed=True),
}  # fmt: skip


def find(feature: str) -> tuple[str, Feature, int]:
    """The name, the feature and the size that a case's `feature` stands for: "window 1024" -> ("window", .., 1024)."""
    name, _, last = feature.rpartition(" ")
    name, size = (name, int(last)) if last.isdecimal() else (feature, 0)
    if name not in FEATURES:
        raise ValueError(f"feature must be one of {', '.join(filter(None, FEATURES))}, got {feature!r}")
    return name, FEATURES[name], size
