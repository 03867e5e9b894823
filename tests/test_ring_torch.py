"""flash/ring.py within torch: what compiles, what is differentiable and what says that it is not, what travels, what
is held."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flash import mods
from flash.attention import flash_attention
from flash.links import Links
from flash.ring import begin, info, ring_attention, setting_of, shard, unshard
from flash.ring_call import flatten
from flash.shards import SHARDINGS
from tests.ranks import Team, refusals

METHODS = ("ring", "all_gather", "ulysses")


def leaves(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape or (2, 4, 12, 8), dtype=dtype, requires_grad=True) for _ in range(3)]


def compiled(group: Any, dynamic: bool, backend: str) -> list[float]:
    """How far compiled calls are from eager ones, forward and backward, of a world, a mesh and a group."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    ids = mods.document(torch.arange(12) // 5)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)  # of the two ranks' rows together
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 7, "max_seqlen_k": 7}
    kinds: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((2, 4, 6, 8), {"group": group, "causal": True}),
        ((2, 4, 6, 8), {"mesh": mesh, "window": (3, 0), "softcap": 2.0}),
        ((2, 4, 6, 8), {"group": group, "sinks": torch.zeros(4, requires_grad=True), "mask_mod": ids, "scale": 0.2}),
        ((6, 4, 8), {"group": group, "causal": True, **packed}),
    ]
    found = []
    for shape, keywords in kinds:
        torch._dynamo.reset()
        x = torch.randn(shape, requires_grad=True)

        def model(x: torch.Tensor, keywords: dict[str, Any] = keywords) -> Any:
            return ring_attention(x.tanh(), x, x * 2.0, return_lse=True, **keywords)

        inputs = [x, *(y for y in keywords.values() if isinstance(y, torch.Tensor) and y.requires_grad)]
        results = []
        for function in (model, torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)):
            o, lse = function(x)
            grads = torch.autograd.grad(o.square().sum() + lse.sum(), inputs)
            results.append([o, lse, *grads])
        results.append([*torch.no_grad()(torch.compile(model, fullgraph=True, backend=backend))(x), *grads])
        found += [float((a - b).abs().max()) for other in results[1:] for a, b in zip(results[0], other, strict=True)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_each_rank_compiles_without_a_graph_break(team: Team, dynamic: bool) -> None:
    for found in team.run(compiled, dynamic, "aot_eager", ranks=2):
        assert max(found) < 1e-5


def opchecked(group: Any) -> str:
    q, k, v = (x.detach() for x in leaves())
    setting = setting_of(group, "contiguous", "auto", True)
    call, _ = begin(q, k, v, setting, {"causal": True, "sinks": torch.zeros(4)})
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.flash.ring_forward.default, (q, k, v, *flatten(call)), test_utils=tests)
    o, lse, lengths = torch.ops.flash.ring_forward(q, k, v, *flatten(call))
    saved = (torch.randn_like(o), None, q, k, v, o, lse, lengths)
    needs = [True, True, True, False, False, True]
    torch.library.opcheck(torch.ops.flash.ring_backward.default, (*saved, *flatten(call), needs), test_utils=tests)
    return "alike"


def test_the_ops_pass_opcheck(team: Team) -> None:
    assert team.run(opchecked, ranks=2) == ["alike", "alike"]


def underivable(group: Any) -> list[str]:
    """What is said where a derivative would be lost; every rank asks for the same."""
    q, k, v = leaves(dtype=torch.float64)

    def call(x: torch.Tensor) -> torch.Tensor:
        return ring_attention(x, k.detach(), v.detach(), group=group)  # type: ignore[return-value]

    def twice() -> Any:
        (grad,) = torch.autograd.grad(call(q).square().sum(), q, create_graph=True)
        return torch.autograd.grad(grad.sum(), q)

    raw = torch.ops.flash.ring_forward
    calls: list[Callable[[], Any]] = [
        twice,
        lambda: torch.func.jvp(call, (q.detach(),), (torch.ones_like(q),)),
        lambda: torch.func.grad(lambda x: call(x).sum())(q.detach()),
        lambda: torch.func.vmap(call)(q.detach().expand(2, *q.shape)),
        lambda: raw(q, k, v, [], "()"),
    ]
    return refusals(calls)


def test_what_has_no_derivative_says_so(team: Team) -> None:
    for found in team.run(underivable, ranks=2):
        assert "differentiable once" in found[0] and "does not serve torch.vmap" in found[3]
        assert len(found) == 5


class Counted:
    """How many numbers each rank sends in a call."""

    def __init__(self) -> None:
        self.sent = 0
        self.posts = 0

    def __enter__(self) -> "Counted":
        self.post = Links.post

        def counting(links: Links, sends: Any, receives: Any) -> Any:
            going = [x.numel() for peer, x in sends if peer != links.rank]
            self.sent += sum(going)
            self.posts += bool(going)
            return self.post(links, sends, receives)

        Links.post = counting  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Links.post = self.post  # type: ignore[method-assign]


def travelled(group: Any, heads_k: int, keywords: dict[str, Any]) -> tuple[int, int, int]:
    """Numbers sent forward, messages of them, and numbers sent backward."""
    q = torch.randn(1, 4, 8, 16, requires_grad=True)
    k, v = (torch.randn(1, heads_k, 8, 16, requires_grad=True) for _ in range(2))
    with Counted() as forward:
        o = ring_attention(q, k, v, group=group, **keywords)
    with Counted() as backward:
        o.sum().backward()
    return forward.sent, forward.posts, backward.sent


def test_groups_move_their_key_heads_only(team: Team) -> None:
    each = 2 * 8 * 16  # keys and values of a head
    for heads_k in (1, 2, 4):
        for found in team.run(travelled, heads_k, {"method": "ring"}, ranks=4):
            # backward, keys travel again, and their gradients a step behind them, then home
            assert found == (3 * heads_k * each, 3, 6 * heads_k * each)


def test_a_window_sends_nothing_further_than_it_sees(team: Team) -> None:
    each = 2 * 8 * 16
    window = {"window": (8, 0), "method": "ring"}
    sent = [found[0] // each for found in team.run(travelled, 1, window, ranks=4)]
    assert sent == [1, 1, 1, 0]
    assert [found[0] for found in team.run(travelled, 1, {"window": 0, "method": "ring"}, ranks=4)] == [0] * 4
    causal = [found[0] // each for found in team.run(travelled, 1, {"causal": True, "method": "ring"}, ranks=4)]
    assert causal == [1, 2, 3, 0]  # rank r sends on its own keys and those of the r ranks before it


def test_all_gather_fetches_what_is_seen(team: Team) -> None:
    each = 2 * 8 * 16
    found = team.run(travelled, 1, {"causal": True, "method": "all_gather"}, ranks=4)
    assert [x[0] // each for x in found] == [3, 2, 1, 0]
    assert [x[2] // each for x in found] == [3, 3, 3, 3]  # again, and the gradients back to whom they belong


def quiet(group: Any) -> tuple[int, float]:
    """all_gathers of a call that promises that ranks agree, and how far it is from one that does not."""
    count, gather = [0], dist.all_gather

    def counting(*args: Any, **keywords: Any) -> Any:
        count[0] += 1
        return gather(*args, **keywords)

    q, k, v = leaves(seed=group.rank())
    asked = ring_attention(q, k, v, group=group, causal=True)
    dist.all_gather = counting
    try:
        told = ring_attention(q, k, v, group=group, causal=True, run_check=False)
        told.sum().backward()
    finally:
        dist.all_gather = gather
    return count[0], float((asked - told).abs().max())


def test_ranks_that_promise_to_agree_do_not_ask(team: Team) -> None:
    assert team.run(quiet, ranks=3) == [(0, 0.0)] * 3


def unasked(group: Any) -> tuple[int, int]:
    """Numbers sent backward where no gradient of keys is asked for, and where nothing is asked for at all."""
    q, k, v = leaves()
    with Counted() as some:
        ring_attention(q, k.detach(), v.detach(), group=group, method="ring").sum().backward()
    with Counted() as none, torch.no_grad():
        assert not ring_attention(q, k, v, group=group, method="ring").requires_grad
    assert k.grad is None and q.grad is not None
    return some.sent // k.numel(), none.sent // k.numel()


def test_gradients_that_are_not_asked_for_do_not_travel(team: Team) -> None:
    assert team.run(unasked, ranks=2) == [(4, 2)] * 2  # keys and values forward, and again backward


def parted(group: Any, sharding: str) -> float:
    """shard and unshard, there and back, on every axis and with gradients."""
    torch.manual_seed(4)
    worst = 0.0
    for shape, dim in (((2, 3, 13, 4), 2), ((13,), 0), ((3, 13), -1), ((2, 1, 5), 1), ((4, 0), 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        part = shard(x, group=group, sharding=sharding, dim=dim)
        whole = unshard(part, group=group, sharding=sharding, dim=dim)
        assert whole.shape == x.shape and torch.equal(whole, x)
        weight = torch.randn(shape, dtype=torch.float64) * (group.rank() + 1)
        weights = [torch.empty_like(weight) for _ in range(group.size())]
        dist.all_gather(weights, weight, group=group)
        (grad,) = torch.autograd.grad((whole * weight).sum(), x)
        # of the sum of all ranks' losses, on the rows that this rank has
        expected = shard(torch.stack(weights).sum(0), group=group, sharding=sharding, dim=dim)
        got = shard(grad, group=group, sharding=sharding, dim=dim)
        worst = max(worst, float((got - expected).abs().max()) if got.numel() else 0.0)
        assert grad.count_nonzero() <= part.numel()
    return worst


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_unshard_is_the_inverse_of_shard(team: Team, sharding: str) -> None:
    assert max(team.run(parted, sharding, ranks=3)) < 1e-12


def asked(group: Any, length: int, heads_k: int, keywords: dict[str, Any]) -> dict[str, Any]:
    q, k = torch.zeros(1, 8, length, 8), torch.zeros(1, heads_k, length, 8)
    return info(q, k, k, group=group, **keywords)


@pytest.mark.parametrize("length, heads_k, keywords, method, words", [
    (4096, 8, {}, "ring", "4096 rows of a rank and heads share each key, 4096 or more"),
    (1024, 2, {}, "ring", "4096 rows"), (64, 8, {}, "ulysses", "64 rows .* 8 heads divide among 4 ranks"),
    (64, 8, {"window": (10, 0)}, "ring", "at most 1 hops away, of 3"),
    (64, 8, {"mask": torch.ones(64, 256, dtype=torch.bool)}, "all_gather", "mask has an axis of queries"),
    (64, 8, {"method": "all_gather"}, "all_gather", "asked for by name"),
])  # fmt: skip
def test_the_method_and_its_reason_are_told(
    team: Team, length: int, heads_k: int, keywords: dict[str, Any], method: str, words: str
) -> None:
    import re

    for found in team.run(asked, length, heads_k, keywords, ranks=4):
        assert found["method"] == method and re.search(words, found["reason"]), found["reason"]
        assert found["world_size"] == 4 and found["lengths_k"] == [length] * 4


def test_heads_that_do_not_divide_are_served_by_others(team: Team) -> None:
    (found, *_) = team.run(asked, 64, 8, {}, ranks=3)
    assert found["method"] == "all_gather" and "8 heads do not divide among 3 ranks" in found["reason"]
    assert found["hops"] == [2] and found["sees"] == [[0, 1, 2]] * 3


def of_one_seed(group: Any) -> float:
    """Dropout of rank 0's generator, whatever those of the others hold: that of one device after the same seed."""
    q, k, v = (x.detach() for x in leaves(dtype=torch.float64))
    torch.manual_seed(31)
    whole = flash_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(31 + group.rank())
    parts = [shard(x, group=group) for x in (q, k, v)]
    o = ring_attention(*parts, group=group, dropout_p=0.4, method="ring")
    return float((o - shard(whole, group=group)).abs().max())


def test_dropout_is_that_of_one_device_after_the_same_seed(team: Team) -> None:
    assert max(team.run(of_one_seed, ranks=4)) < 1e-14


def in_autocast(group: Any) -> str:
    q, k, v = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = ring_attention(q, k, v, group=group)
    o.sum().backward()
    return f"{o.dtype} {q.grad.dtype}"  # type: ignore[union-attr]


def test_autocast_casts_as_on_one_device(team: Team) -> None:
    assert team.run(in_autocast, ranks=2) == ["torch.bfloat16 torch.float32"] * 2


def checkpointed(group: Any) -> float:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for wrapped in (False, True):
        q, k, v = leaves(seed=group.rank())

        def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return ring_attention(q, k, v, group=group, causal=True)

        o = checkpoint(block, q, k, v, use_reentrant=False) if wrapped else block(q, k, v)
        grads.append(torch.autograd.grad(o.square().sum(), (q, k, v)))
    return max(float((x - y).abs().max()) for x, y in zip(*grads, strict=True))


def test_activation_checkpointing_asks_again_and_finds_the_same(team: Team) -> None:
    assert team.run(checkpointed, ranks=3) == [0.0] * 3


def peak(group: Any, total: int) -> int:
    """Bytes that a call, forward and backward, takes of a rank at its peak, beside what it holds before."""
    rows = total // group.size()
    given = [torch.randn(1, 2, rows, 64, requires_grad=True) for _ in range(3)]
    do = torch.randn(1, 2, rows, 64)
    ring_attention(*(x[:, :, :64] for x in given), group=group, window=(64, 0)).backward(do[:, :, :64])
    for x in given:
        x.grad = None
    before = high_water()
    ring_attention(*given, group=group, window=(64, 0), causal=True, method="ring").backward(do)
    return high_water() - before


def high_water() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read memory from")
def test_memory_of_a_rank_is_its_part_of_the_sequence(tmp_path: Path) -> None:
    peaks = {}
    for ranks, total in ((2, 2**16), (4, 2**16), (2, 2**17), (4, 2**17)):
        team = Team(tmp_path / f"{ranks}-{total}", size=ranks)
        peaks[ranks, total] = max(team.run(peak, total, ranks=ranks))
        team.end()
    # as many rows a rank: of four, some both send and receive
    assert 0.8 < peaks[4, 2**17] / peaks[2, 2**16] < 1.5, peaks
    for ranks in (2, 4):  # and twice as many take about twice as much, where the square would be four times
        assert peaks[ranks, 2**17] < 2.5 * peaks[ranks, 2**16], peaks
    assert peaks[4, 2**17] < 0.75 * peaks[2, 2**17], peaks


def order_of_events(group: Any) -> list[str]:
    """What a rank does on the ring: messages that it starts and waits for, and products between them."""
    from flash import dispatch, links

    events: list[str] = []
    post, wait, forward = Links.post, links.Post.wait, dispatch.forward

    def posting(self: Links, *args: Any) -> Any:
        events.append("post")
        return post(self, *args)

    def waiting(self: Any) -> None:
        events.append("wait")
        wait(self)

    def computing(problem: Any) -> Any:
        events.append("attend")
        return forward(problem)

    Links.post, links.Post.wait, dispatch.forward = posting, waiting, computing  # type: ignore[method-assign]
    try:
        q, k, v = (x.detach() for x in leaves())
        ring_attention(q, k, v, group=group, method="ring")
    finally:
        Links.post, links.Post.wait, dispatch.forward = post, wait, forward  # type: ignore[method-assign]
    return events


def test_keys_are_on_their_way_while_a_rank_computes(team: Team) -> None:
    for events in team.run(order_of_events, ranks=3):
        assert events == ["post", "attend", "wait", "post", "attend", "wait", "attend"]


@pytest.mark.gpu
def test_a_group_of_gpus_is_asked_over_nccl(tmp_path: Path) -> None:
    # one rank: what several do needs several GPUs, and has never been run
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        q, k, v = (x.detach().cuda().requires_grad_() for x in leaves(2, 4, 200, 64))
        found = []
        for method in ("ring", "all_gather", "ulysses"):
            o, lse = ring_attention(q, k, v, method=method, causal=True, dropout_p=0.1, return_lse=True)
            assert o.isfinite().all() and lse.isfinite().all()
            o = ring_attention(q, k, v, method=method, causal=True)
            found.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
        o = flash_attention(q, k, v, causal=True)
        want = (o, *torch.autograd.grad(o.square().sum(), (q, k, v)))
        for got in found:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(unshard(shard(q)), q)
    finally:
        dist.destroy_process_group()
