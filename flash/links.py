"""What ranks of a process group say to each other: who calls what, and keys and values on their way.

Point-to-point messages of torch.distributed, posted and waited for later, so that a rank computes meanwhile; nothing
else is asked of a backend than that and all_gather, so that gloo on a CPU and NCCL on GPUs do alike. A peer that is
gone, or says nothing for the group's time-out, is an error of torch.distributed on the ranks that wait for it.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .shards import Way

VERSION = 1  # of what `agree` says first
Message = tuple[int, torch.Tensor]  # the rank at the other end, and what goes or comes


class Links(NamedTuple):
    """A process group as its member `rank` sees it; ranks are those of the group."""

    group: Any
    rank: int
    world_size: int

    @classmethod
    def named(cls, name: str) -> "Links":
        """The links of the group that torch.distributed knows by a name."""
        from torch.distributed import distributed_c10d  # absent where torch was built without it

        group = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
        return cls(group, group.rank(), group.size())

    def warm(self, device: torch.device) -> None:
        """Have all ranks of a group of GPUs communicate once: NCCL wants that before messages between some of them."""
        if device.type != "cpu":
            communicate(self.group.group_name, device)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> "Post":
        """Start to send and to receive; what is empty is not sent, nor what goes to the rank itself."""
        own = [x for peer, x in sends if peer == self.rank]
        for x, into in zip(own, (x for peer, x in receives if peer == self.rank), strict=True):
            into.copy_(x)
        found = [
            dist.P2POp(op, x, group=self.group, group_peer=peer)
            for op, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, x in messages
            if x.numel() > 0 and peer != self.rank
        ]
        return Post(dist.batch_isend_irecv(found) if found else [], [x for _, x in (*sends, *receives)])

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """`post`, and wait."""
        self.post(sends, receives).wait()

    def device(self, like: torch.device) -> torch.device:
        """Where small tensors travel: on the CPU if the group reaches it, where nothing waits for a GPU's queue."""
        return torch.device("cpu") if "cpu:" in str(dist.get_backend_config(self.group)) else like

    def gathered(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x, of one shape everywhere, from each rank."""
        found = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(found, x, group=self.group)
        return found

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """x of the group's first rank."""
        there = x.clone()
        dist.broadcast(there, group_src=0, group=self.group)
        return there


@cache
def communicate(name: str, device: torch.device) -> None:
    """One collective of a group, the first time that it is asked for."""
    dist.all_reduce(torch.zeros(1, device=device), group=Links.named(name).group)


class Post(NamedTuple):
    """Messages on their way, and the tensors that must stay until they have come."""

    works: Sequence[Any]
    tensors: Sequence[torch.Tensor]

    def wait(self) -> None:
        """Wait for all of them: on a GPU the current stream does, on a CPU the caller."""
        for work in self.works:
            work.wait()


def agree(
    links: Links,
    like: torch.device,
    call: Mapping[str, Any],
    lengths: Sequence[int],
    refusal: Exception | None,
) -> list[list[int]]:
    """What ranks must know before they wait for each other: that all make the same call, and how long their shards are.

    One all_gather of a few numbers; where they differ one more, of the calls' texts, so that all ranks name the same
    difference. On a GPU whose group does not reach the CPU, the host waits for it.

    Args:
        links: the group.
        like: device of the call's tensors.
        call: what must be alike everywhere, by the name that messages have for it.
        lengths: of this rank's shards.
        refusal: what this rank has against its own call.

    Returns:
        The lengths of each rank.

    Raises:
        ValueError: the calls differ.
        RuntimeError: another rank refused its own call.
        Exception: `refusal`, where it is given.
    """
    device = links.device(like)
    text = json.dumps({"refusal": str(refusal)} if refusal else {name: str(x) for name, x in call.items()}).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
    said = [VERSION, digest, len(text), refusal is not None, *lengths]
    heads = [x.tolist() for x in links.gathered(torch.tensor(said, dtype=torch.int64, device=device))]
    if all(head[:4] == heads[0][:4] for head in heads) and refusal is None:
        return [head[4:] for head in heads]
    longest = max(head[2] for head in heads)
    padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=device)
    texts = [bytes(x.tolist()) for x in links.gathered(padded)]
    if refusal is not None:
        raise refusal
    calls = [json.loads(found) for found in texts]
    refused = {rank: found["refusal"] for rank, (head, found) in enumerate(zip(heads, calls, strict=True)) if head[3]}
    if refused:
        raise RuntimeError("; ".join(f"rank {rank} refused its call: {why}" for rank, why in refused.items()))
    raise ValueError("; ".join(differences(calls)))


def differences(calls: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What is not alike in the calls of all ranks, by name."""
    for name in dict.fromkeys(name for call in calls for name in call):
        found: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            found.setdefault(call.get(name, "nothing"), []).append(rank)
        if len(found) > 1:
            got = " and ".join(f"{value} on rank{'s' * (len(on) > 1)} {listed(on)}" for value, on in found.items())
            yield f"{name} must be alike on all ranks, got {got}"


def listed(ranks: Sequence[int]) -> str:
    """A few ranks by number, many by the first ones."""
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


class Block(NamedTuple):
    """Keys and values of one rank, while another has them.

    Args:
        source: whose they are; None where none came at this hop.
        flat: all of their numbers in one row.
        way: on which way they came; None: they are its own.
        hop: how far.
    """

    source: int | None
    flat: torch.Tensor
    way: Way | None
    hop: int


def ring_pass(
    links: Links, ways: Sequence[Way], own: torch.Tensor, sizes: Sequence[int]
) -> Generator[Block, None, None]:
    """The rank's own keys and values, then those that pass by; the next ones travel while the caller has these.

    Whoever does not take all of them closes it, which waits for what is under way.

    Args:
        links: the group.
        ways: how they travel, as all ranks know it.
        own: the rank's own ones, in one row.
        sizes: how many numbers those of each rank are.
    """
    steps = [(way, hop) for way in ways for hop in range(1, way.hops + 1)]
    held = Block(links.rank, own, None, 0)
    for step in (*steps, None):
        under_way = None
        if step is not None:
            way, hop = step
            under_way = departure(links, way, hop, own if hop == 1 else held.flat, sizes)
            if hop == 1 and way is ways[-1]:
                del own  # which memory is short of; the messages hold it until it has gone
        try:
            yield held
        except GeneratorExit:
            if under_way is not None:
                with suppress(RuntimeError):  # of a peer that is gone: what the caller raises says more
                    under_way[0].wait()
            raise
        if under_way is not None:
            post, held = under_way
            post.wait()
            del post, under_way


def departure(links: Links, way: Way, hop: int, flat: torch.Tensor, sizes: Sequence[int]) -> tuple[Post, Block]:
    """Send `flat`, what the rank had at the hop before, on its way, and receive what comes at this hop."""
    leaving, source = way.source(links.rank, hop - 1), way.source(links.rank, hop)
    coming = Block(source, flat.new_empty(0 if source is None else sizes[source]), way, hop)
    sends = [(way.neighbour(links.rank, 1), flat)] if leaving is not None and way.reach[leaving] >= hop else []
    receives = [] if source is None else [(way.neighbour(links.rank, -1), coming.flat)]
    return links.post(sends, receives), coming
