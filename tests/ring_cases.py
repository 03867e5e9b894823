"""What ranks do in the tests of ring_attention: a call beside the same call on one device.

Inputs are made from a seed, so that every rank has the whole as well. Gradients of bias, slopes and sinks are each
rank's share, and added up here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from flash.ring import ring_attention
from flash.shards import Piece, lengths_of, pieces_of
from tests import features
from tests.bounds import Inputs, Outputs, differentiate
from tests.features import Sizes

SHARES = ("dbias", "dalibi_slopes", "dsinks")  # of whose gradients each rank has a part
ROWS = ("o", "dq")
KEYS = ("dk", "dv")


def cut(x: torch.Tensor, pieces: Sequence[Piece], dim: int) -> torch.Tensor:
    """The pieces of a whole, along an axis."""
    parts = [x.narrow(dim, piece.start, piece.stop - piece.start) for piece in pieces]
    return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)


def lengths_or(lengths: Sequence[int] | None, total: int, ranks: int, sharding: str) -> Sequence[int]:
    """The lengths that a test asks for, or those that `shard` makes."""
    return lengths_of(total, ranks, sharding) if lengths is None else lengths


class Places:
    """Where a call's rows and keys are on the ranks."""

    def __init__(
        self, x: Inputs, group: Any, sharding: str, lengths_q: Sequence[int] | None, lengths_k: Sequence[int] | None
    ) -> None:
        self.packed = "cu_seqlens_q" in x.options
        self.axis = 0 if self.packed else x.q.dim() - 2
        ranks, rank = group.size(), group.rank()
        totals = x.q.shape[self.axis], x.k.shape[self.axis]
        lengths = [lengths_or(own, n, ranks, sharding) for own, n in zip((lengths_q, lengths_k), totals, strict=True)]
        self.rows, self.keys = (pieces_of(own, sharding)[rank] for own in lengths)

    def inputs(self, x: Inputs) -> Inputs:
        """A rank's part of a call."""
        options = dict(x.options)
        for name in ("mask", "bias"):
            if name in options and options[name].dim() >= 2 and options[name].shape[-2] > 1:
                options[name] = cut(options[name], self.rows, options[name].dim() - 2)
        q, do = (cut(t, self.rows, self.axis) for t in (x.q, x.do))  # type: ignore[arg-type]
        k, v = (cut(t, self.keys, self.axis) for t in (x.k, x.v))
        dlse = None if x.dlse is None else cut(x.dlse, self.rows, x.dlse.dim() - 1)
        return Inputs(q, k, v, do, dlse, options)

    def outputs(self, y: Outputs) -> Outputs:
        """A rank's part of what the whole call returns; of shares all."""
        found = {name: getattr(y, name) for name in y._fields if getattr(y, name) is not None}
        for name, x in found.items():
            if name == "lse":
                found[name] = cut(x, self.rows, x.dim() - 1)
            elif name in ROWS or (name == "dbias" and x.dim() >= 2 and x.shape[-2] > 1):
                found[name] = cut(x, self.rows, self.axis if name in ROWS else x.dim() - 2)
            elif name in KEYS:
                found[name] = cut(x, self.keys, self.axis)
        return Outputs(**found)


def sharded(group: Any, **setting: Any) -> Callable[..., Any]:
    """(q, k, v, **options) -> (o, lse) of ring_attention, dropout drawn by rank 0 from the seed of `features`."""

    def attention(*args: torch.Tensor, **options: Any) -> Any:
        torch.manual_seed(features.SEED + group.rank())
        return ring_attention(*args, group=group, return_lse=True, **setting, **options)

    return attention


def difference(got: Outputs, want: Outputs, group: Any) -> float:
    """The largest |got - want| / (1 + max |want|) of all outputs, ranks' shares added up; NaN must be NaN."""
    worst = 0.0
    for name, expected in zip(want._fields, want, strict=True):
        if expected is None:
            continue
        found = getattr(got, name)
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        has_rows = name == "dbias" and expected.dim() >= 2 and expected.shape[-2] > 1
        if name in SHARES and not has_rows:
            found = found.clone()
            dist.all_reduce(found, group=group)
        assert torch.equal(found.isnan(), expected.isnan()), f"{name}: NaN elsewhere"
        same = (found == expected) | found.isnan()  # -inf
        away = torch.where(same, 0.0, found.double() - expected.double()).abs()
        size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
        worst = max(worst, float(away.max()) / (1 + size) if away.numel() else 0.0)
    return worst


def beside_one_device(
    group: Any, names: Sequence[str], sizes: Sizes, setting: dict[str, Any], backend: str = "auto",
    lengths_q: Sequence[int] | None = None, lengths_k: Sequence[int] | None = None,
    change: Callable[[Inputs], Inputs] | None = None,
) -> float:  # fmt: skip
    """How far a call with these features is from the same on one device, forward and backward, on this rank."""
    torch.manual_seed(5)
    x = features.call_of(lambda t: t, names, sizes)
    x = change(x) if change else x
    where = Places(x, group, setting.get("sharding", "contiguous"), lengths_q, lengths_k)
    config = features.TILES if backend == "triton" else None
    want = where.outputs(differentiate(features.attention("torch", config), x))
    got = differentiate(sharded(group, backend=backend, config=config, **setting), where.inputs(x))
    return difference(got, want, group)
