"""flash/dtensor.py: DTensors are served as on one device, whatever is sharded, and parallel models need no change."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from flash.attention import flash_attention, flash_attention_varlen
from tests import features
from tests.bounds import Inputs, Outputs, differentiate
from tests.features import Sizes
from tests.ranks import RankError, Team, refusals

CLOSE = 1e-12
SIZES = Sizes(batch=4, heads=4, heads_k=2, head_dim_v=6)
BATCH, HEADS, ROWS, ALL = Shard(0), Shard(1), Shard(2), Replicate()
# placements of q, and of k and v, on a mesh of two by two
PLACED = {
    "batch": ((BATCH, ALL), (BATCH, ALL)),
    "heads": ((ALL, HEADS), (ALL, HEADS)),
    "batch and heads": ((BATCH, HEADS), (BATCH, HEADS)),
    "rows": ((ALL, ROWS), (ALL, ROWS)),
    "heads and rows": ((HEADS, ROWS), (HEADS, ROWS)),
    "batch and rows": ((ROWS, BATCH), (ROWS, BATCH)),
    "heads of shared keys": ((HEADS, HEADS), (ALL, ALL)),
    "rows of shared keys": ((HEADS, ROWS), (HEADS, ALL)),
    "nothing": ((ALL, ALL), (ALL, ALL)),
}
NAMES = ["plain", *(name for name in features.NAMES if name not in ("groups", "packed"))]


def mesh_of(group: Any, *sizes: int) -> DeviceMesh:
    if len(sizes) == 1:  # without a new group, which all ranks of the team would have to make
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("one",))
    return DeviceMesh("cpu", torch.arange(group.size()).view(sizes), mesh_dim_names=("one", "two"))


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def distributed(mesh: DeviceMesh, of_q: Any, of_k: Any) -> Any:
    """(q, k, v, **options) -> (o, lse) of whole tensors, by DTensors and back; differentiable operands are DTensors."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        torch.manual_seed(features.SEED + dist.get_rank())
        replicated = [ALL] * mesh.ndim
        q, k, v = (
            DTensor.from_local(x, mesh, replicated, run_check=False).redistribute(placements=places)
            for x, places in ((q, of_q), (k, of_k), (v, of_k))
        )
        for name in ("bias", "alibi_slopes", "sinks"):
            if name in options:
                options[name] = DTensor.from_local(options[name], mesh, replicated, run_check=False)
        function: Any = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention
        o, lse = function(q, k, v, return_lse=True, **options)
        assert tuple(o.placements) == tuple(of_q) and o.shape[:-1] == q.shape[:-1]
        return o.full_tensor(), lse.full_tensor()

    return attention


def difference(got: Outputs, want: Outputs) -> float:
    worst = 0.0
    for name, expected in zip(want._fields, want, strict=True):
        if expected is not None:
            found = getattr(got, name)
            assert torch.equal(found.isnan(), expected.isnan()), name
            same = (found == expected) | found.isnan()
            size = expected[expected.isfinite()].abs().max().item()
            worst = max(worst, float(torch.where(same, 0.0, found - expected).abs().max()) / (1 + size))
    return worst


def beside(group: Any, names: tuple[str, ...], of_q: Any, of_k: Any, sizes: Sizes = SIZES) -> float:
    """How far a call of DTensors is from that of one device, forward and backward."""
    torch.manual_seed(6)
    x = features.call_of(lambda t: t, [name for name in names if name != "plain"], sizes)
    want = differentiate(features.attention("torch", None), x)
    mesh = mesh_of(group, *([group.size()] if len(of_q) == 1 else (2, 2)))
    return difference(differentiate(distributed(mesh, of_q, of_k), x), want)


@pytest.mark.sampled(20, all=True)
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("name", NAMES)
def test_placements_are_served_as_on_one_device(team: Team, name: str, placed: str) -> None:
    found = team.run(beside, (name,), *PLACED[placed], ranks=4)
    assert max(found) <= CLOSE, found


@pytest.mark.sampled(4, all=True)
@pytest.mark.parametrize("of_q, of_k", [((HEADS,), (HEADS,)), ((Shard(0),), (Shard(0),)), ((ALL,), (ALL,)),
                                        ((HEADS,), (ALL,))])  # fmt: skip
@pytest.mark.parametrize("names", [("packed",), ("packed", "causal", "sinks"), ("packed", "alibi_slopes", "dropout_p"),
                                   ("packed", "score_mod", "mask_mod")], ids="-".join)  # fmt: skip
def test_packed_sequences_are_served_too(team: Team, names: tuple[str, ...], of_q: Any, of_k: Any) -> None:
    found = team.run(beside, names, of_q, of_k, SIZES._replace(head_dim_v=8), ranks=2)
    assert max(found) <= CLOSE, found


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_axes_need_not_divide(team: Team, length: int) -> None:
    sizes = SIZES._replace(batch=3, seqlen_q=length, seqlen_k=length + 1)
    for placed, name in itertools.product(("batch", "rows", "batch and rows"), ("causal", "bias", "dropout_p")):
        found = team.run(beside, (name,), *PLACED[placed], sizes, ranks=4)
        assert max(found) <= CLOSE, found


@pytest.mark.parametrize("heads, heads_k, of_q, of_k", [
    (4, 2, (HEADS, HEADS), (ALL, HEADS)), (8, 2, (HEADS,), (HEADS,)), (4, 1, (HEADS,), (HEADS,)),
    (8, 4, (HEADS,), (HEADS,)), (8, 2, (HEADS,), (ALL,)), (8, 1, (HEADS, HEADS), (ALL, ALL)),
    (8, 2, (HEADS, HEADS), (HEADS, ALL)),
    (12, 3, (HEADS,), (ALL,)),
])  # fmt: skip
def test_query_heads_find_their_key_heads_or_all_ranks_refuse(
    team: Team, heads: int, heads_k: int, of_q: Any, of_k: Any
) -> None:
    sizes = SIZES._replace(heads=heads, heads_k=heads_k)
    try:
        found = team.run(beside, ("causal",), of_q, of_k, sizes, ranks=4)
        assert max(found) <= CLOSE, found
    except RankError as error:
        assert [said[0] for said in error.errors if said] == ["NotImplementedError"] * 4
        assert (heads, heads_k) == (12, 3) or ((heads, heads_k) in ((4, 2), (8, 2), (4, 1)) and HEADS in of_k)


def of_one_head(group: Any) -> float:
    torch.manual_seed(2)
    x = Inputs(*(torch.randn(4, 10, 8, dtype=torch.float64) for _ in range(4)), torch.randn(4, 10).double(),
               {"causal": True, "bias": torch.randn(10, 10).double()})  # fmt: skip
    want = differentiate(features.attention("torch", None), x)
    places = (Shard(0), Shard(1))
    return difference(differentiate(distributed(mesh_of(group, 2, 2), places, places), x), want)


def test_one_head_needs_no_axis(team: Team) -> None:
    assert max(team.run(of_one_head, ranks=4)) <= CLOSE


def placed_gradients(group: Any) -> list[str]:
    """How gradients are placed: as what they are of, the shares of operands that ranks share added up."""
    mesh = mesh_of(group, 2)
    q, k, v = (distribute_tensor(torch.randn(2, 4, 6, 8), mesh, [ROWS]).requires_grad_() for _ in range(3))
    sinks = distribute_tensor(torch.zeros(4), mesh, [ALL]).requires_grad_()
    o = flash_attention(q, k, v, sinks=sinks)
    return [str(x.placements) for x in torch.autograd.grad(o.sum(), [q, k, v, sinks])]


def test_gradients_are_placed_as_what_they_are_of(team: Team) -> None:
    for found in team.run(placed_gradients, ranks=2):
        assert found == [str((ROWS,))] * 3 + [str((ALL,))]


class Block(torch.nn.Module):
    """Attention of a transformer, with learned sinks, as one writes it for one device."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, n, dtype=torch.float64) for n in (32, 16, 16, 32))
        self.sinks = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        o = flash_attention(q, k, v, causal=True, sinks=self.sinks)
        return self.o(o.transpose(1, 2).flatten(-2))  # type: ignore[union-attr]


def gradients(model: torch.nn.Module, x: Any) -> list[torch.Tensor]:
    y = model(x)
    (whole(y) if isinstance(y, DTensor) else y).square().sum().backward()
    return [whole(y.detach()), *(whole(p.grad) for p in model.parameters())]


def parallel(group: Any, how: str, compiled: bool) -> float:
    """A model made parallel by torch's own means, beside the same on one device."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(9)
    model, x = Block(), torch.randn(4, 10, 32, dtype=torch.float64)
    want = gradients(copy.deepcopy(model), x)
    mesh = mesh_of(group, group.size())
    if how == "tensor":
        columns = ColwiseParallel(use_local_output=False)
        plan: Any = {"q": columns, "k": columns, "v": columns, "o": RowwiseParallel()}
        model = parallelize_module(model, mesh, plan)
        model.sinks = torch.nn.Parameter(distribute_tensor(model.sinks.detach(), mesh, [Shard(0)]))
    elif how == "sequence":
        for part in (model.q, model.k, model.v, model.o):
            for name, p in list(part.named_parameters()):
                setattr(part, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [ALL])))
        model.sinks = torch.nn.Parameter(distribute_tensor(model.sinks.detach(), mesh, [ALL]))
        x = distribute_tensor(x, mesh, [Shard(1)])
    elif how == "fsdp":
        model = fully_shard(model, mesh=mesh)
        own = x.chunk(group.size())[group.rank()]
        (model(own).square().sum() * group.size()).backward()  # FSDP takes the mean
        found = [whole(p.grad) for p in model.parameters()]
        return max(float((a - b).abs().max()) for a, b in zip(found, want[1:], strict=True))
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    found = gradients(run, x)
    return max(float((a - b).abs().max()) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("how", ["tensor", "sequence", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_parallel_model_needs_no_change(team: Team, how: str) -> None:
    assert max(team.run(parallel, how, False, ranks=2)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensor", "sequence"])
def test_a_parallel_model_compiles(team: Team, how: str) -> None:
    assert max(team.run(parallel, how, True, ranks=2)) < 1e-10


def refused(group: Any) -> list[str]:
    mesh, other = mesh_of(group, 2, 2), init_device_mesh("cpu", (4,))

    def of(places: Any, heads: int = 4, on: DeviceMesh = mesh) -> Any:
        return distribute_tensor(torch.randn(2, heads, 8, 8), on, places, src_data_rank=None)

    plain, q = torch.randn(2, 4, 8, 8), of((ALL, HEADS))
    partial = DTensor.from_local(plain, mesh, (Partial(), ALL), run_check=False)
    calls: list[Any] = [
        lambda: flash_attention(q, plain, plain),
        lambda: flash_attention(q, of((ALL,), on=other), of((ALL,), on=other)),
        lambda: flash_attention(partial, partial, partial),
        lambda: flash_attention(q, of((ALL, BATCH)), of((ALL, BATCH))),
        lambda: flash_attention(q, q, of((ALL, ALL))),
        lambda: flash_attention(of((ROWS, ROWS)), of((ROWS, ROWS)), of((ROWS, ROWS))),
        lambda: flash_attention(of((ALL, Shard(3))), of((ALL, Shard(3))), of((ALL, Shard(3)))),
        lambda: flash_attention(of((ALL, HEADS), 3), of((ALL, HEADS), 3), of((ALL, HEADS), 3)),
        lambda: flash_attention(q, q, q, sinks=torch.zeros(4, requires_grad=True)),
        lambda: flash_attention(plain, q, q),
    ]
    return refusals(calls)


def test_what_is_not_served_says_what_would_be(team: Team) -> None:
    words = [
        "k must be a DTensor where q, k or v is one, got Tensor", "k must be on q's mesh", "redistribute what is not",
        "k and v follow q's heads", "k and v are placed alike", "more than one dimension of the mesh",
        "head_dim is not sharded", "3 heads do not divide among 2 ranks", "sinks requires grad, so it must be",
        "q must be a DTensor",
    ]  # fmt: skip
    try:
        answers = team.run(refused, ranks=4)
    except RankError as error:
        raise AssertionError(error.errors) from error
    for found in answers:
        for message, word in zip(found, words, strict=True):
            assert word in message, message
