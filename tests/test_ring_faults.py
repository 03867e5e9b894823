"""flash/ring.py where ranks disagree, refuse, are silent or gone: said by name, on every rank, and nobody waits on."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flash import Config, mods
from flash.links import Links
from flash.ring import ring_attention, shard, unshard
from tests.ranks import RankError, Team, refusals

TIMEOUT = 3.0  # of the groups below, in seconds
SLACK = 6.0  # for processes that share two cores


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape or (2, 4, 8, 16), dtype=dtype) for _ in range(3)]


def document() -> Any:
    return mods.document(torch.arange(16) // 5)


# What rank 1 does otherwise, and what every rank is told.
DIFFERENT: dict[str, tuple[Callable[[], tuple[list[torch.Tensor], dict[str, Any]]], str]] = {
    "dtype": (lambda: (tensors(dtype=torch.float64), {}), "q's dtype must be alike on all ranks, got "
              "float32 on ranks 0, 2 and float64 on rank 1"),
    "batch": (lambda: (tensors(1, 4, 8, 16), {}), r"q's shape .* got \[2, 4, seqlen, 16\] .* \[1, 4, seqlen, 16\]"),
    "heads": (lambda: (tensors(2, 2, 8, 16), {}), r"q's shape must .* \[2, 2, seqlen, 16\] on rank 1"),
    "head_dim": (lambda: (tensors(2, 4, 8, 12), {}), r"k's shape must be alike"),
    "causal": (lambda: (tensors(), {"causal": True}), "causal must be alike .* got nothing on ranks 0, 2 and True"),
    "window": (lambda: (tensors(), {"window": (3, 0)}), r"window must .* nothing on ranks 0, 2 and \(3, 0\) on"),
    "q_offset": (lambda: (tensors(), {"q_offset": 2}), "q_offset must"),
    "scale": (lambda: (tensors(), {"scale": 0.5}), "scale must .* 0.5 on rank 1"),
    "softcap": (lambda: (tensors(), {"softcap": 3.0}), "softcap must"),
    "sinks": (lambda: (tensors(), {"sinks": torch.zeros(4)}), r"sinks .* float32 of shape \[4\], values \w+ on rank 1"),
    "alibi_slopes": (lambda: (tensors(), {"alibi_slopes": torch.zeros(4)}), "alibi_slopes must"),
    "mask": (lambda: (tensors(), {"mask": torch.ones(16, dtype=torch.bool)}), "mask must be alike"),
    "bias": (lambda: (tensors(), {"bias": torch.ones(8, 16)}), r"bias must .* \[1, 1, seqlen_q or 1, 16\]"),
    "dropout_p": (lambda: (tensors(), {"dropout_p": 0.1}), "dropout_p must be alike"),
    "mask_mod": (lambda: (tensors(), {"mask_mod": document()}), "mask_mod must .* document"),
    "score_mod": (lambda: (tensors(), {"score_mod": mods.tanh_softcap(3.0)}), "score_mod must .* tanh_softcap"),
    "sharding": (lambda: (tensors(), {"sharding": "zigzag"}), "sharding .* contiguous on ranks 0, 2 and zigzag on"),
    "method": (lambda: (tensors(), {"method": "ring"}), "method must .* got auto on ranks 0, 2 and ring"),
    "backend": (lambda: (tensors(), {"backend": "torch"}), "backend must be alike"),
    "deterministic": (lambda: (tensors(), {"deterministic": True}), "deterministic must be alike"),
    "config": (lambda: (tensors(), {"config": Config(32, 32)}), r"config\['forward'\] must be alike"),
    "gradients": (lambda: ([x.requires_grad_() for x in tensors()], {}), "what requires grad must .* got nothing on "
                  "ranks 0, 2 and q, k, v on rank 1"),
    "packed": (lambda: (tensors(8, 4, 16), packed(16)), "q's shape must"),
    "twice": (lambda: (tensors(), {"window": (3, 0), "softcap": 2.0}), "window must .*; softcap must"),
}  # fmt: skip


def packed(total: int) -> dict[str, Any]:
    cu = torch.tensor([0, 5, total], dtype=torch.int32)
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": total, "max_seqlen_k": total}


def differ(group: Any, name: str) -> str:
    """What this rank is told where rank 1 makes another call; and that the ranks can go on."""
    given, keywords = DIFFERENT[name][0]() if group.rank() == 1 else (tensors(), {})
    try:
        ring_attention(*given, group=group, **keywords)
    except ValueError as error:
        ring_attention(*tensors(), group=group)
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_between_ranks_is_named_on_all_of_them(team: Team, name: str) -> None:
    told = team.run(differ, name, ranks=3)
    assert len(set(told)) == 1
    assert re.search(DIFFERENT[name][1], told[0]), told[0]


def values(group: Any, what: str) -> str:
    """What is said of operands on a CPU whose values differ, or of cu_seqlens that are one tensor on one rank only."""
    rank, given = group.rank(), tensors()
    cu = torch.tensor([0, 5, 16], dtype=torch.int32)
    options: dict[str, Any] = {
        "sinks": lambda: {"sinks": torch.full((4,), float(rank))},
        "mods": lambda: {"mask_mod": mods.dilated_window(3 + rank, 2)},
        "identity": lambda: packed(16) | {"cu_seqlens_q": cu, "cu_seqlens_k": cu if rank else cu.clone()},
        "lengths": lambda: packed(16) | {"cu_seqlens_q": cu - rank, "cu_seqlens_k": cu},
    }[what]()
    if "cu_seqlens_q" in options:
        given = tensors(8, 4, 16)
    with pytest.raises(ValueError) as error:
        ring_attention(*given, group=group, **options)
    return str(error.value)


@pytest.mark.parametrize("what, words", [
    ("sinks", "sinks must be alike on all ranks, got float32 of shape [4], values"), ("mods", "mask_mod must be alike"),
    ("identity", "cu_seqlens_q being cu_seqlens_k, the same tensor,"), ("lengths", "cu_seqlens_q must be"),
])  # fmt: skip
def test_values_on_a_cpu_are_compared(team: Team, what: str, words: str) -> None:
    for message in team.run(values, what, ranks=2):
        assert words in message


def usual(group: Any) -> bool:
    keywords: dict[str, Any] = {"causal": False, "dropout_p": 0.0, "backend": "auto", "window": None}
    return bool(ring_attention(*tensors(), group=group, **(keywords if group.rank() else {})).isfinite().all())


def test_what_is_left_out_is_alike_to_what_it_stands_for(team: Team) -> None:
    assert team.run(usual, ranks=2) == [True, True]


def again(group: Any) -> list[str]:
    """Calls that no backend serves, each followed by one that is served: nothing of the first may be under way."""
    found = []
    for _ in range(3):
        with pytest.raises(NotImplementedError) as error:
            ring_attention(*tensors(), group=group, backend="hopper", method="ring")
        found.append(str(error.value))
        ring_attention(*tensors(), group=group, method="ring")
    return found


def test_a_refusal_leaves_the_group_as_it_was(team: Team) -> None:
    for found in team.run(again, ranks=3):
        assert all("'hopper'" in message for message in found)


def failing(group: Any) -> float:
    """An error on all ranks while keys are under way, and the next call."""
    from flash import dispatch

    forward = dispatch.forward

    def fail(problem: Any) -> Any:
        raise MemoryError("no memory")

    dispatch.forward = fail
    try:
        with pytest.raises(MemoryError):
            ring_attention(*tensors(), group=group, method="ring")
    finally:
        dispatch.forward = forward
    q = torch.ones(1, 2, 4, 8)
    return float((ring_attention(q, q, q, group=group, method="ring") - 1).abs().max())


def test_an_error_under_way_does_not_meet_the_next_call(team: Team) -> None:
    assert max(team.run(failing, ranks=3)) < 1e-6


# What rank 1 is given that nobody could serve, its own error, and a word of it that the others are told.
WRONG: dict[str, tuple[Callable[[], tuple[list[Any], dict[str, Any]]], type[Exception], str]] = {
    "rank": (lambda: (tensors(8, 16), {}), ValueError, "q must have 3 or 4 dimensions"),
    "no tensor": (lambda: ([1, 2, 3], {}), ValueError, "q must be a torch.Tensor"),
    "integers": (lambda: ([x.long() for x in tensors()], {}), ValueError, "q must be float16"),
    "window": (lambda: (tensors(), {"window": -1}), ValueError, "window must be >= 0"),
    "keyword": (lambda: (tensors(), {"colour": 1}), TypeError, "has no keyword 'colour'"),
    "nan": (lambda: (tensors(), {"scale": float("nan")}), ValueError, "scale must be a finite float or None, got nan"),
    "object": (lambda: (tensors(), {"scale": object()}), ValueError, "scale must be a finite float or None"),
    "tensor": (lambda: (tensors(), {"scale": torch.tensor(0.5)}), ValueError, "scale must be a finite float or None"),
    "infinite": (lambda: (tensors(), {"window": (float("inf"), 0)}), ValueError, "window must be an int, a tuple"),
    "sharding": (lambda: (tensors(), {"sharding": "zagzag"}), ValueError, "sharding must be one of"),
    "method": (lambda: (tensors(), {"method": "rnig"}), ValueError, "method must be one of"),
    "return_lse": (lambda: (tensors(), {"return_lse": 1}), ValueError, "return_lse must be True or False"),
    "run_check": (lambda: (tensors(), {"run_check": 1}), ValueError, "run_check must be True or False"),
    "mask": (lambda: (tensors(), {"mask": torch.ones(1, 1, 5, 16) > 0}), ValueError, "mask must broadcast"),
    "float mask": (lambda: (tensors(), {"mask": 3}), ValueError, "mask must be a torch.Tensor"),
    "config": (lambda: (tensors(), {"config": 3}), ValueError, "config must be"),
    "block_mask": (lambda: (tensors(), {"block_mask": 3}), TypeError, "block_mask must be a torch.nn.attention"),
    "mask_mod": (lambda: (tensors(), {"mask_mod": 3}), TypeError, "mask_mod must be a flash.mods.MaskMod"),
    "backend": (lambda: (tensors(), {"backend": "fpga"}), ValueError, "backend must be one of"),
    "lengths": (lambda: (tensors(8, 4, 16), {"max_seqlen_q": 5}), ValueError, "must be given together"),
}  # type: ignore[dict-item]  # fmt: skip


def refuse(group: Any, name: str) -> tuple[str, str]:
    given, keywords = WRONG[name][0]() if group.rank() == 1 else (tensors(), {})
    try:
        ring_attention(*given, group=group, **keywords)
    except Exception as error:
        ring_attention(*tensors(), group=group)
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("name", WRONG)
def test_a_rank_that_refuses_its_arguments_takes_the_others_along(team: Team, name: str) -> None:
    _, kind, words = WRONG[name]
    told = team.run(refuse, name, ranks=3)
    assert told[1][0] == kind.__name__ and words in told[1][1], told[1]
    for rank in (0, 2):
        assert told[rank][0] == "RuntimeError" and "rank 1 refused its call: " in told[rank][1], told[rank]
        assert words in told[rank][1]


def wrong_everywhere(group: Any, what: str) -> str:
    own = group.rank()
    options: dict[str, Any] = {
        "zigzag": {"sharding": "zigzag"},
        "keys of the mask": {"mask": torch.ones(17, dtype=torch.bool)},
        "slopes": {"alibi_slopes": torch.ones(3)},
        "ids": {"mask_mod": mods.document(torch.zeros(15, dtype=torch.int64))},
        "triton": {"backend": "hopper"},
    }[what]
    given = [torch.randn(2, 4, 8 + 2 * own if what == "zigzag" else 8, 16) for _ in range(3)]
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as error:
        ring_attention(*given, group=group, **options)
    return str(error.value)


@pytest.mark.parametrize("what, words", [
    ("zigzag", r"q's shards must have the lengths that flash.ring.shard makes with sharding='zigzag', [9, 9] of 18"),
    ("keys of the mask", "mask must broadcast to"), ("slopes", "alibi_slopes must have shape [4]"),
    ("ids", "q_ids must reach all 16 of seqlen_q"), ("triton", "does not serve"),
])  # fmt: skip
def test_what_is_wrong_with_the_whole_is_said_on_every_rank(team: Team, what: str, words: str) -> None:
    for message in team.run(wrong_everywhere, what, ranks=2):
        assert words in message


def alone(group: Any, what: str, where: int) -> tuple[str, float]:
    """What a rank is told, and after how long, where rank 1 dies, or says nothing, at its `where`-th message."""
    if group.rank() == 1:
        post, count = Links.post, [0]

        def stop(self: Links, *args: Any) -> Any:
            count[0] += 1
            if count[0] > where:
                time.sleep(60) if what == "silent" else os._exit(3)
            return post(self, *args)

        Links.post = stop  # type: ignore[method-assign]
        if where < 0:
            time.sleep(60) if what == "silent" else os._exit(3)
    begin = time.monotonic()
    try:
        leaves = [x.requires_grad_() for x in tensors()]
        ring_attention(*leaves, group=group, method="ring").sum().backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "nothing", time.monotonic() - begin


@pytest.mark.sampled(8, all=True)
@pytest.mark.parametrize("what", ["gone", "silent"])
@pytest.mark.parametrize("where", [-1, 0, 1, 3], ids=["before", "forward", "later", "backward"])
def test_a_rank_that_is_gone_or_silent_is_an_error_within_the_time_out(tmp_path: Path, what: str, where: int) -> None:
    team = Team(tmp_path, size=3, timeout=TIMEOUT)
    try:
        team.run(rank_of, ranks=3)  # all of them are there, before one goes
        team.start(alone, what, where, ranks=3)
        for rank in (0, 2):
            (message, took), error = team.answer(rank)
            assert error is None and message != "nothing"
            assert took < TIMEOUT + SLACK
    finally:
        team.end()


def test_without_a_process_group_it_says_what_to_do() -> None:
    assert not dist.is_initialized()
    for call in (lambda: ring_attention(*tensors()), lambda: shard(tensors()[0]), lambda: unshard(tensors()[0])):
        with pytest.raises(ValueError, match="call torch.distributed.init_process_group first"):
            call()


def of_groups(group: Any) -> list[str]:
    """What is said of wrong groups, meshes and settings; each rank says it by itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    calls: list[Callable[[], Any]] = [
        lambda: ring_attention(*tensors(), mesh=mesh),
        lambda: ring_attention(*tensors(), mesh=mesh["cp"], group=group),
        lambda: ring_attention(*tensors(), group="world"),
        lambda: ring_attention(*tensors(), group=dist.GroupMember.NON_GROUP_MEMBER),
        lambda: ring_attention(*tensors(), group=group, sharding="striped"),
        lambda: ring_attention(*tensors(), group=group, method="star"),
        lambda: ring_attention(*tensors(), group=group, run_check=1),  # type: ignore[arg-type]
        lambda: shard(torch.ones(3), group=group, dim=1),
        lambda: unshard(3, group=group),  # type: ignore[arg-type]
    ]
    found = refusals(calls)
    o = ring_attention(*tensors(), mesh=mesh["cp"])
    assert o.shape == (2, 4, 8, 16)
    return found


def test_wrong_groups_and_settings_are_named(team: Team) -> None:
    words = [
        "mesh must have one dimension, got 2", "group and mesh must not both", "group must be a torch.distributed",
        "that this rank is in", "sharding must be one of contiguous, zigzag", "method must be one of auto, ring",
        "run_check must be True or False", "dim must be an axis of x", "x must be a torch.Tensor",
    ]  # fmt: skip
    for found in team.run(of_groups, ranks=4):
        for message, word in zip(found, words, strict=True):
            assert word in message


def test_an_answer_that_never_comes_is_no_deadlock_of_the_tests(tmp_path: Path) -> None:
    team = Team(tmp_path, size=2)
    with pytest.raises(RankError, match="no such thing"):
        team.run(fail, ranks=2)
    assert team.run(rank_of, ranks=2) == [0, 1]
    team.end()
    assert not team.alive()


def fail(group: Any) -> None:
    raise LookupError("no such thing")


def rank_of(group: Any) -> int:
    return int(group.rank())
