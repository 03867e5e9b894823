"""flash/ring.py: a sequence on several ranks is the sequence on one device, whatever the keywords and the shards."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flash.attention import flash_attention
from flash.ring import ring_attention, shard, unshard
from flash.shards import SHARDINGS
from tests import features
from tests.features import Sizes
from tests.ranks import RankError, Team
from tests.ring_cases import beside_one_device

CLOSE = 1e-12  # of 1 + max, float64
METHODS = ("ring", "all_gather", "ulysses")
SIZES = Sizes(heads=4, heads_k=4, head_dim_v=6)
UNSERVED = [{"packed", name} for name in ("mask", "padding", "bias", "block_mask")]
NAMES = features.NAMES


def assert_close(found: list[float]) -> None:
    assert max(found) <= CLOSE, found


@pytest.mark.sampled(24, all=True)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", *NAMES])
def test_every_keyword_is_that_of_one_device(team: Team, name: str, method: str, sharding: str, ranks: int) -> None:
    names = () if name == "plain" else (name,)
    setting = {"method": method, "sharding": sharding}
    if method == "ulysses" and name in ("mask", "bias"):
        with pytest.raises(RankError, match=f"{name} has an axis of queries.*use method='ring'"):
            team.run(beside_one_device, names, SIZES, setting, ranks=ranks)
    else:
        assert_close(team.run(beside_one_device, names, SIZES, setting, ranks=ranks))


PAIRS = [pair for pair in itertools.combinations(NAMES, 2) if set(pair) not in ({"mask", "padding"}, *UNSERVED)]


@pytest.mark.sampled(20, all=True)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_pair_of_keywords_is_that_of_one_device(team: Team, pair: tuple[str, str]) -> None:
    for sharding, ranks in (("zigzag", 2), ("contiguous", 3)):
        assert_close(team.run(beside_one_device, pair, SIZES, {"sharding": sharding, "method": "ring"}, ranks=ranks))


@pytest.mark.parametrize("packed", [False, True])
def test_all_keywords_at_once_are_those_of_one_device(team: Team, packed: bool) -> None:
    left_out = {"packed"} if not packed else {"mask", "padding", "bias", "block_mask"}
    names = [name for name in NAMES if name not in left_out]
    assert_close(team.run(beside_one_device, names, SIZES, {"sharding": "zigzag", "method": "ring"}, ranks=4))


@pytest.mark.sampled(8, all=True)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (2, 3), (5, 40), (40, 5), (0, 7), (7, 0), (33, 33), (64, 64)])
def test_lengths_need_not_divide_by_the_ranks(team: Team, seqlen_q: int, seqlen_k: int, sharding: str) -> None:
    sizes = SIZES._replace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    for names, method in itertools.product(((), ("causal", "sinks"), ("window", "alibi_slopes")), METHODS):
        setting = {"sharding": sharding, "method": method}
        assert_close(team.run(beside_one_device, names, sizes, setting, ranks=4))


@pytest.mark.sampled(4, all=True)
@pytest.mark.parametrize("lengths_q, lengths_k", [
    ([19, 0, 0, 0], [0, 0, 0, 23]), ([5, 0, 10, 4], [0, 23, 0, 0]), ([1, 2, 3, 13], [20, 1, 1, 1]),
    ([4, 5, 5, 5], [8, 8, 7, 0]),
])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_shards_may_be_uneven_and_ranks_without_keys(
    team: Team, method: str, lengths_q: list[int], lengths_k: list[int]
) -> None:
    for names in ((), ("causal",), ("window", "sinks"), ("padding", "dropout_p"), ("packed", "causal")):
        args = names, SIZES, {"method": method}, "auto", lengths_q, lengths_k
        if "packed" in names:  # whose totals are others
            args = (*args[:4], [2, 7, 0, 9], [0, 11, 4, 3])
        assert_close(team.run(beside_one_device, *args, ranks=4))


def bad_lengths(x: Any) -> Any:
    options = dict(x.options)
    options["cu_seqlens_k"] = torch.tensor([0, 7, 30, 18, 18], dtype=torch.int32)  # longer than what is there
    return x._replace(options=options)


def spread_lengths(x: Any) -> Any:
    options = dict(x.options)
    for side in "qk":  # some rows of no sequence before the first and after the last
        options[f"cu_seqlens_{side}"] = (options[f"cu_seqlens_{side}"] + 2).clamp(max=15)
    return x._replace(options=options)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("change", [bad_lengths, spread_lengths])
@pytest.mark.parametrize("method", METHODS)
def test_hostile_lengths_harm_their_own_sequence_only(team: Team, method: str, change: Any) -> None:
    for names in (("packed",), ("packed", "causal", "sinks"), ("packed", "alibi_slopes", "groups")):
        args = names, SIZES, {"method": method}, "auto", None, None, change
        assert_close(team.run(beside_one_device, *args, ranks=4))


def share_lengths(x: Any) -> Any:
    return x._replace(options=x.options | {"cu_seqlens_q": x.options["cu_seqlens_k"]})


def test_documents_that_share_their_lengths_skip_hops(team: Team) -> None:
    # their positions are known by those among all rows, so that a window ends the ring
    sizes = SIZES._replace(lengths=((9, 9), (20, 20), (3, 3)))
    for names in (("packed", "causal"), ("packed", "window")):
        args = names, sizes, {"method": "ring"}, "auto", None, None, share_lengths
        assert_close(team.run(beside_one_device, *args, ranks=4))


def of_one_head(group: Any, packed: bool) -> float:
    """Calls without an axis of heads, beside those with one."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 12, 8, dtype=torch.float64) for _ in range(3))
    mask, bias = torch.rand(2, 12, 12) < 0.8, torch.randn(12, 12, dtype=torch.float64)
    mask, bias = shard(mask, group=group, dim=1), shard(bias, group=group, dim=0)
    options: dict[str, Any] = {"mask": mask, "bias": bias}
    dim = 1
    if packed:
        cu = torch.tensor([0, 5, 12], dtype=torch.int32)
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 7, "max_seqlen_k": 7}
        q, k, v, dim = q[0], k[0], v[0], 0
    parts = [shard(x, group=group, dim=dim) for x in (q, k, v)]
    o, lse = ring_attention(*parts, group=group, return_lse=True, **options)
    heads = {"mask": mask[:, None], "bias": bias[None, None]} if not packed else options
    o4, lse4 = ring_attention(*(x.unsqueeze(1) for x in parts), group=group, return_lse=True, **heads)
    assert o.shape == parts[0].shape and lse.shape == parts[0].shape[:-1]
    return float((o - o4.squeeze(1)).abs().max() + (lse - lse4.squeeze(0 if packed else 1)).abs().max())


@pytest.mark.parametrize("packed", [False, True])
def test_one_head_needs_no_axis(team: Team, packed: bool) -> None:
    assert team.run(of_one_head, packed, ranks=2) == [0.0, 0.0]


def kept_layout(group: Any) -> bool:
    q = torch.randn(2, 6, 4, 8).transpose(1, 2)  # [batch, heads, seqlen, head_dim], rows outermost
    o = ring_attention(q, q, q, group=group)
    return bool(o.stride() == q.stride())


def test_o_has_the_axis_order_of_q(team: Team) -> None:
    assert team.run(kept_layout, ranks=2) == [True, True]


def repeated(group: Any, method: str) -> bool:
    """Whether a call and its gradients have the same bits when they are made again."""
    found = []
    for _ in range(3):
        torch.manual_seed(group.rank())
        leaves = [torch.randn(1, 4, 24, 16, requires_grad=True) for _ in range(3)]
        sinks = torch.zeros(4, requires_grad=True)
        o = ring_attention(*leaves, group=group, method=method, causal=True, sharding="zigzag", sinks=sinks)
        found.append([o, *torch.autograd.grad(o.square().sum(), [*leaves, sinks])])
    return all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_calls_repeat_to_the_bit(team: Team, method: str) -> None:
    assert all(team.run(repeated, method, ranks=4))


def many_times(group: Any) -> int:
    """Calls of all kinds one after another, forward and backward, ranks starting when they come to it."""
    count = 0
    for turn in range(20):
        for method, sharding in itertools.product(METHODS, SHARDINGS):
            leaves = [torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(3)]
            o = ring_attention(
                *leaves, group=group, method=method, sharding=sharding, window=turn, causal=turn % 2 == 0
            )
            o.sum().backward()
            count += 1
    return count


def test_twenty_runs_end(team: Team) -> None:
    assert team.run(many_times, ranks=4) == [120] * 4


def half_errors(group: Any, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Root mean square errors against float64: of shards, and of one device in the same dtype."""
    torch.manual_seed(3)
    wide = [torch.randn(1, 4, 256, 32).to(dtype).double() for _ in range(4)]
    found = []
    for kind in ("exact", "whole", "parts"):
        *leaves, do = [x.to(torch.float64 if kind == "exact" else dtype) for x in wide]
        leaves = [x.requires_grad_() for x in leaves]
        if kind == "parts":
            parts = [shard(x, group=group, sharding="zigzag") for x in leaves]
            o = unshard(ring_attention(*parts, group=group, sharding="zigzag", causal=True), group=group,
                        sharding="zigzag")  # fmt: skip
            grads = torch.autograd.grad(o, leaves, do / group.size())
            for x in grads:
                wider = x.double()
                dist.all_reduce(wider, group=group)
                x.copy_(wider)
        else:
            o = flash_attention(*leaves, causal=True)
            grads = torch.autograd.grad(o, leaves, do)
        found.append([o.double(), *(x.double() for x in grads)])
    exact, *others = found
    rms = [[float((x - y).square().mean().sqrt()) for x, y in zip(other, exact, strict=True)] for other in others]
    return {name: (rms[1][at], rms[0][at]) for at, name in enumerate(("o", "dq", "dk", "dv"))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(team: Team, dtype: torch.dtype) -> None:
    # parts are merged in float32, so that more ranks are no worse than one
    for errors in team.run(half_errors, dtype, ranks=4):
        for name, (parts, whole) in errors.items():
            assert parts <= 1.02 * whole, (name, parts, whole)


@pytest.mark.sampled(5)
@pytest.mark.interpret
@pytest.mark.parametrize("names", [(), ("causal", "dropout_p"), ("score_mod", "mask_mod"), ("window", "bias", "sinks"),
                                   ("packed", "causal", "alibi_slopes")], ids="-".join)  # fmt: skip
def test_interpreted_kernels_serve_the_ring(team: Team, names: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    args = names, SIZES._replace(heads_k=2), {"method": "ring", "sharding": "zigzag"}, "triton"
    assert_close(team.run(beside_one_device, *args, ranks=2))


def rows_of_one(group: Any, name: str, method: str) -> float:
    """One row a rank, or none, whose row of a mask or bias looks like one for all."""
    torch.manual_seed(8)
    total, rank = 2, group.rank()
    q, k, v = torch.randn(1, 4, total, 8), torch.randn(1, 4, 16, 8), torch.randn(1, 4, 16, 8)
    whole = torch.rand(1, 1, total, 16) < 0.5 if name == "mask" else torch.randn(1, 4, total, 16)
    want = flash_attention(q, k, v, **{name: whole})[:, :, rank : rank + 1]
    parts = (x[:, :, rank : rank + 1] for x in (q, whole))
    q, own = parts
    k, v = (shard(x, group=group) for x in (k, v))
    got = ring_attention(q, k, v, group=group, method=method, **{name: own})
    return float((got - want).abs().max()) if got.numel() else 0.0


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("method", ["auto", "ring", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_row_of_a_mask_is_not_taken_for_all(team: Team, name: str, method: str, ranks: int) -> None:
    assert max(team.run(rows_of_one, name, method, ranks=ranks)) < 1e-5


def loss_of_lse(group: Any, method: str) -> float:
    """lse in the loss of the last rank only, and on the others o alone."""
    torch.manual_seed(2)
    whole = [torch.randn(1, 4, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parts = [shard(x.detach(), group=group).clone().requires_grad_() for x in whole]
    o, lse = flash_attention(*whole, return_lse=True)
    rows = slice(16 - 16 // group.size(), 16)
    (o.sum() + lse[:, :, rows].sum()).backward()
    o, lse = ring_attention(*parts, group=group, method=method, return_lse=True)
    (o.sum() + (lse.sum() if group.rank() == group.size() - 1 else 0.0)).backward()
    pairs = zip(parts, whole, strict=True)
    return max(float((x.grad - shard(y.grad, group=group)).abs().max()) for x, y in pairs)  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_lse_may_be_in_the_loss_of_some_ranks(team: Team, method: str) -> None:
    assert max(team.run(loss_of_lse, method, ranks=4)) < 1e-12
