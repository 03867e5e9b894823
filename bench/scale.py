"""What a call of ring_attention should cost: floating point operations of each step against the bytes of its hop.

    products   = flops / rate                       of the pairs that a rank's rows see at a step, counted one by one
    transfer   = latency + bytes / bandwidth        of the rank that sends or receives most
    step       = max(products + merging, transfer)  what travels does so while a rank computes
    call       = its own cost + sum of its steps    of all_gather and ulysses a step computes or transfers, never both
    efficiency = time on one device / (world_size * time)

Where ranks share processors, and messages take processors too, a step takes no less than all of their work together.

Who holds, sees and sends what is asked of the code itself (`flash/shards.py`, `flash/ring_call.py` and the methods, on
tensors without memory). Ranks are taken to keep step with each other. The ring is hidden from the length on at which
no transfer takes longer than the products beside it: `crossover` by a formula, `found_crossover` by asking each step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, log2, sqrt
from typing import NamedTuple

import torch

from flash import ring_methods, ulysses
from flash.ring_call import Call, Layout, Setting
from flash.shards import Band, Piece, Way, lengths_of, sees, ways_of

FLOPS = {"forward": 4, "backward": 10}  # of a pair of one head, times head_dim: two products, and five
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
LONGEST = 2**26  # rows of a rank, where the search for a crossover ends


@dataclass(frozen=True)
class Job:
    """One call of ring_attention by all ranks, of one sequence; head_dim_v is head_dim.

    Args:
        world_size: ranks.
        keys: of all ranks together.
        method: "ring", "all_gather" or "ulysses".
        sharding: "contiguous" or "zigzag".
        causal: as in flash_attention.
        heads: query heads.
        heads_k: key heads.
        head_dim: width of each.
        itemsize: bytes of a number of q, k, v and o.
        queries: of all ranks together; None: as many as keys.
    """

    world_size: int
    keys: int
    method: str = "ring"
    sharding: str = "contiguous"
    causal: bool = True
    heads: int = 32
    heads_k: int = 8
    head_dim: int = 128
    itemsize: int = 2
    queries: int | None = None

    @property
    def rows(self) -> int:
        """Queries of all ranks."""
        return self.keys if self.queries is None else self.queries

    @property
    def accumulator(self) -> int:
        """Bytes of a number that sums are held in."""
        return max(self.itemsize, 4)


class Block(NamedTuple):
    """A call of the kernels: rows of a piece against keys, of which `shared` are seen by every row."""

    heads: int
    heads_k: int
    rows: int
    keys: int
    shared: int
    pairs: int


class Message(NamedTuple):
    """Bytes on their way from one rank to another."""

    source: int
    target: int
    nbytes: int


class Step(NamedTuple):
    """What ranks do at a time, each for itself.

    Args:
        blocks: of each rank.
        merged: bytes that each rank reads and writes where it adds up what blocks gave.
        packed: bytes that it reads and writes where it copies what travels.
        messages: what travels meanwhile.
    """

    blocks: list[list[Block]]
    merged: list[int]
    packed: list[int]
    messages: list[Message]


class Point(NamedTuple):
    """The kernels' rate at one shape, in floating point operations of visible pairs a second."""

    rows: int
    keys: int
    causal: bool
    forward: float
    backward: float


class Device(NamedTuple):
    """What a rank computes with, while all others do.

    Args:
        name: for tables.
        points: rates; that of the nearest shape counts.
        memory: bytes a second that merging reads and writes.
        packing: bytes of a copy, and bytes a second that copying what travels reads and writes; the nearest counts.
        cores: processors that all ranks share, and leave to each other; each has its own where there are enough.
        calls: seconds of a call by itself, by method and pass; absent is 0.
    """

    name: str
    points: tuple[Point, ...]
    memory: float
    packing: tuple[tuple[int, float], ...]
    cores: float = inf
    calls: tuple[tuple[tuple[str, str], float], ...] = ()

    def rate(self, rows: int, keys: int, causal: bool, what: str) -> float:
        """The rate at the point that is nearest, one of the same kind where there is any."""
        alike = [point for point in self.points if point.causal == causal] or self.points
        nearest = min(alike, key=lambda p: abs(log2(p.rows / rows)) + abs(log2(p.keys / keys)))
        return nearest.forward if what == "forward" else nearest.backward

    def copying(self, nbytes: int) -> float:
        """Seconds of a copy that reads and writes so many bytes in all: new memory is dear where it is much."""
        if not nbytes:
            return 0.0
        return nbytes / min(self.packing, key=lambda known: abs(log2(2 * known[0] / nbytes)))[1]


class Link(NamedTuple):
    """What a rank sends at, and receives at the same time.

    Args:
        name: for tables.
        bandwidth: bytes a second.
        latency: seconds that any message takes.
        work: processor seconds, of those that compute, for a second of a message; 0 where others carry it.
    """

    name: str
    bandwidth: float
    latency: float
    work: float = 0.0


# what the code is asked


@lru_cache(maxsize=4096)
def call_of(job: Job) -> tuple[Call, Layout]:
    """The call as rank 0 makes it, of tensors without memory, and how the sequence lies."""
    lengths_q, lengths_k = (lengths_of(n, job.world_size, job.sharding) for n in (job.rows, job.keys))
    shapes = [(job.heads, lengths_q[0]), (job.heads_k, lengths_k[0]), (job.heads_k, lengths_k[0])]
    q, k, v = (torch.empty(1, *shape, job.head_dim, dtype=DTYPES[job.itemsize], device="meta") for shape in shapes)
    setting = Setting("", job.world_size, job.sharding, job.method, run_check=False)
    call = Call(q, k, v, {}, {"causal": job.causal}, {}, {}, setting)
    return call, call.layout([[*lengths, *call.rows()] for lengths in zip(lengths_q, lengths_k, strict=True)])


@lru_cache(maxsize=256)
def ways_by(needs: tuple[tuple[bool, ...], ...]) -> list[Way]:
    """flash.shards.ways_of, which takes its time where ranks are many."""
    return ways_of([list(row) for row in needs])


def ways(job: Job) -> list[Way]:
    """The ways that a job's keys travel on a ring."""
    return ways_by(tuple(map(tuple, call_of(job)[1].needs)))


def unserved(job: Job) -> str | None:
    """Why a method does not serve a job, or None where it does."""
    return ulysses.unserved(*call_of(job), job.world_size) if job.method == "ulysses" else None


def ramp(first: int, count: int, top: int) -> int:
    """The sum of min(max(x, 0), top) over x = first ... first + count - 1."""

    def below(x: int) -> int:  # over 0 ... x - 1
        inside = min(max(x, 0), top)
        return inside * (inside - 1) // 2 + top * (max(x, 0) - inside)

    return below(first + count) - below(first)


def block_of(job: Job, heads: tuple[int, int], queries: Piece, keys: Piece, band: Band) -> Block:
    """Rows of one piece against keys of another."""
    rows, n, start = queries.stop - queries.start, keys.stop - keys.start, queries.start + band.offset - keys.start
    pairs = rows * n if band.right is None else ramp(start + band.right + 1, rows, n)
    before = n if band.right is None else start + band.right  # the key on the first row's diagonal is the triangle's
    shared = n if before >= n - 1 else max(before, 0)
    if band.left is not None:
        pairs -= ramp(start - band.left, rows, n)
        shared -= min(max(start + rows - 1 - band.left, 0), shared)
    return Block(*heads, rows, n, shared, pairs)


def blocks_of(job: Job, rank: int, keys: list[Piece]) -> list[Block]:
    """A rank's rows against some keys, as the ring's and all_gather's calls of the kernels."""
    _, layout = call_of(job)
    band = layout.band or Band(0, None, None)
    heads = job.heads, job.heads_k
    return [block_of(job, heads, q, k, band) for q in layout.queries[rank] for k in keys if sees(q, k, band)]


def own_numbers(job: Job) -> list[int]:
    """Of keys and values, for each rank."""
    return ring_methods.numbers(*call_of(job))


def merged(job: Job, blocks: list[Block], what: str) -> int:
    """Bytes that adding up what blocks gave reads and writes: two operands and a result, in the sums' dtype."""
    d = job.head_dim
    numbers = sum(b.rows * b.heads * d + (what == "backward") * 2 * b.keys * b.heads_k * d for b in blocks)
    return 3 * numbers * job.accumulator


# steps of each method


def steps_of(job: Job, what: str) -> list[Step]:
    """The steps of a pass, "forward" or "backward".

    Raises:
        NotImplementedError: the method does not serve the job.
    """
    if reason := unserved(job):
        raise NotImplementedError(reason)
    found = {"ring": ring_steps, "all_gather": all_gather_steps, "ulysses": ulysses_steps}[job.method](job, what)
    return list(found)


def ring_steps(job: Job, what: str) -> Iterator[Step]:
    """A step for the rank's own keys and for each hop; backward, one for the gradients' last way home."""
    _, layout = call_of(job)
    ranks, sizes = range(job.world_size), own_numbers(job)
    hops: list[tuple[Way, int]] = [(way, hop) for way in ways(job) for hop in range(1, way.hops + 1)]
    behind: list[Message] = []  # gradients of the step before
    for at in range(len(hops) + 1):
        held = [rank if at == 0 else hops[at - 1][0].source(rank, hops[at - 1][1]) for rank in ranks]
        seen = [source if source is not None and layout.needs[r][source] else None for r, source in enumerate(held)]
        seen = list(ranks) if at == 0 else seen
        blocks = [[] if s is None else blocks_of(job, r, layout.keys[s]) for r, s in enumerate(seen)]
        added = [merged(job, own, what) for own in blocks]
        packed = [2 * sizes[rank] * job.itemsize * (at == 0 and bool(hops)) for rank in ranks]
        messages = [*behind, *(leaving(job, *hops[at], sizes) if at < len(hops) else [])]
        behind = []
        if what == "backward" and at:
            way, hop = hops[at - 1]
            for rank, source in enumerate(held):
                if source is not None:
                    target = way.neighbour(rank, 1) if way.reach[source] > hop else source
                    behind.append(Message(rank, target, sizes[source] * job.accumulator))
                    packed[rank] += sizes[source] * job.accumulator  # zeros
                    added[rank] += 3 * sizes[source] * job.accumulator  # to what others had added
        yield Step(blocks, added, packed, messages)
    if behind:
        yield exchange([0 for _ in ranks], behind)


def exchange(packed: list[int], messages: list[Message]) -> Step:
    """A step at which nothing is computed."""
    return Step([[] for _ in packed], [0 for _ in packed], packed, messages)


def leaving(job: Job, way: Way, hop: int, sizes: list[int]) -> list[Message]:
    """The keys and values that are sent at a hop."""
    sources = [(rank, way.source(rank, hop - 1)) for rank in range(job.world_size)]
    return [
        Message(rank, way.neighbour(rank, 1), sizes[source] * job.itemsize)
        for rank, source in sources
        if source is not None and way.reach[source] >= hop
    ]


def all_gather_steps(job: Job, what: str) -> Iterator[Step]:
    """All keys travel, then all is computed, then backward the gradients travel."""
    _, layout = call_of(job)
    ranks, sizes = range(job.world_size), own_numbers(job)
    pairs = [(s, r) for r in ranks for s in ranks if layout.needs[r][s]]
    fetched = [sum(sizes[s] for s, r in pairs if r == rank) for rank in ranks]
    yield exchange([2 * job.itemsize * sizes[rank] for rank in ranks], [])
    yield exchange([0 for _ in ranks], [Message(s, r, sizes[s] * job.itemsize) for s, r in pairs if s != r])
    blocks = []
    for rank in ranks:
        runs = [(run[0][1].start, run[-1][1].stop) for run in ring_methods.runs(layout, rank)]
        blocks.append(blocks_of(job, rank, [Piece(start, slice(0, stop - start)) for start, stop in runs]))
    side_by_side = [2 * job.itemsize * x for x in fetched]
    if what == "backward":
        side_by_side = [
            x + 4 * job.accumulator * n for x, n in zip(side_by_side, fetched, strict=True)
        ]  # gradients too
    yield Step(blocks, [merged(job, own, what) for own in blocks], side_by_side, [])
    if what == "backward":
        yield exchange([0 for _ in ranks], [Message(r, s, sizes[s] * job.accumulator) for s, r in pairs if s != r])
        arrived = [sum(r == rank for r, _ in pairs) * 3 * sizes[rank] * job.accumulator for rank in ranks]
        yield Step([[] for _ in ranks], arrived, [0 for _ in ranks], [])


def ulysses_steps(job: Job, what: str) -> Iterator[Step]:
    """q, k and v are dealt out by heads one after the other, all is computed, and what came out goes back by rows."""
    call, layout = call_of(job)
    heads, e, a, d = ulysses.heads_of(call, job.world_size), job.itemsize, job.accumulator, job.head_dim
    of_q, of_k = [x.q.stop - x.q.start for x in heads], [x.k.stop - x.k.start for x in heads]
    rows, keys = ([sum(p.stop - p.start for p in own) for own in x] for x in (layout.queries, layout.keys))
    q, k = (of_q, rows), (of_k, keys)

    def deal(whose: tuple[list[int], list[int]], width: int, home: bool = False) -> Iterator[Step]:
        """Bytes `width` of each row and head, to the rank that has the head; with `home` from it."""
        of, lengths = whose
        ranks = range(job.world_size)
        dealt = [(r, h, of[h] * lengths[r] * width) for r in ranks for h in ranks]
        messages = [Message(h, r, n) if home else Message(r, h, n) for r, h, n in dealt if r != h]
        yield exchange([2 * sum(n for r, h, n in dealt if x in (r, h)) for x in ranks], [])  # cut out, put together
        yield exchange([0 for _ in ranks], messages)

    operands = [(q, d * e), (k, d * e), (k, d * e)]
    operands += [(q, d * e), (q, d * e), (q, a), (q, a)] if what == "backward" else []  # o, do, lse, dlse
    for whose, width in operands:
        yield from deal(whose, width)
    queries, all_keys, band = Piece(0, slice(0, job.rows)), Piece(0, slice(0, job.keys)), layout.band
    own = zip(of_q, of_k, strict=True)
    blocks = [[block_of(job, each, queries, all_keys, band or Band(0, None, None))] for each in own]
    yield Step(blocks, [0 for _ in heads], [0 for _ in heads], [])
    back = ((q, d * e), (q, a)) if what == "forward" else ((q, d * a), (k, d * a), (k, d * a))
    for whose, width in back:
        yield from deal(whose, width, home=True)


# time


def flops(job: Job, block: Block, what: str) -> int:
    """Floating point operations of the pairs that a block's rows see."""
    return FLOPS[what] * job.head_dim * block.heads * block.pairs


def products(job: Job, block: Block, what: str, device: Device) -> float:
    """Seconds of a block: keys that every row sees at one rate, the others, a triangle, at that of a causal call."""
    each = FLOPS[what] * job.head_dim * block.heads
    rectangle = block.rows * block.shared
    found = 0.0
    if rectangle:
        found += each * rectangle / device.rate(block.rows, block.shared, False, what)
    if block.pairs > rectangle:
        found += each * (block.pairs - rectangle) / device.rate(block.rows, block.rows, True, what)
    return found


def transfer(step: Step, link: Link) -> float:
    """Seconds until all messages of a step have come: those of the rank that sends or receives most."""
    loads: dict[tuple[str, int], int] = {}
    for source, target, nbytes in step.messages:
        for end in (("sends", source), ("receives", target)):
            loads[end] = loads.get(end, 0) + nbytes
    return link.latency + max(loads.values()) / link.bandwidth if loads else 0.0


def computing(job: Job, step: Step, what: str, device: Device, merging: bool = True) -> list[float]:
    """Seconds of each rank at a step while all are busy; products alone without `merging`."""
    seconds = [sum(products(job, block, what, device) for block in own) for own in step.blocks]
    if merging:
        own = zip(seconds, step.merged, step.packed, strict=True)
        seconds = [x + merged / device.memory + device.copying(packed) for x, merged, packed in own]
    return seconds


def taken(seconds: list[float], step: Step, device: Device, link: Link) -> float:
    """Seconds of a step, of what each rank computes while all are busy.

    The longest of the slowest rank's, with a processor for itself if others have nothing to do; of the transfer; and
    of all work together on the processors that there are.
    """
    sharing = max(1.0, len(seconds) / device.cores)
    carried = link.work * sum(link.latency + message.nbytes / link.bandwidth for message in step.messages)
    return max(max(seconds) / sharing, transfer(step, link), (sum(seconds) / sharing + carried) / device.cores)


def predicted(job: Job, what: str, device: Device, link: Link) -> float:
    """Seconds of a pass: "forward", "backward" or "both"."""
    found = 0.0
    for name in ("forward", "backward") if what == "both" else (what,):
        found += dict(device.calls).get((job.method, name), 0.0)
        found += sum(taken(computing(job, step, name, device), step, device, link) for step in steps_of(job, name))
    return found


def alone(job: Job) -> Job:
    """The same attention on one device."""
    return replace(job, world_size=1, method="ring", sharding="contiguous")


def efficiency(job: Job, what: str, device: Device, link: Link) -> float:
    """Time on one device over the time of all devices together."""
    return predicted(alone(job), what, device, link) / (job.world_size * predicted(job, what, device, link))


# from which length on the ring is hidden


def hidden(job: Job, what: str, device: Device, link: Link) -> bool:
    """Whether no transfer takes longer than the products beside it; gradients' last way home has none beside it."""
    steps = [step for step in steps_of(job, what) if any(step.blocks)]
    return all(transfer(step, link) <= max(computing(job, step, what, device, merging=False)) for step in steps)


def found_crossover(job: Job, what: str, device: Device, link: Link) -> int | None:
    """Rows of a rank, even, from which on a ring of job.world_size ranks is hidden; None where it never is."""

    def at(half: int) -> bool:
        return hidden(replace(job, keys=2 * half * job.world_size), what, device, link)

    low, high = 0, 1
    while not at(high):
        low, high = high, 2 * high
        if 2 * high > LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) else (middle, high)
    return 2 * high


def crossover(job: Job, what: str, device: Device, link: Link) -> float:
    """The same by a formula, for five ranks or more and a device of one rate: n at which, of each kind of step,

    f (a n^2 + b n) / rate = latency + c n / bandwidth      f flops of a pair, all heads
    a n^2 + b n   pairs of a step: n^2 where all are seen; (n^2 + n) / 2 of the rank's own keys where causal, and
                  n^2 / 2 of others' in a zigzag
    c             bytes of a row's keys and values on their way; behind the first hop backward, gradients as well:
                  twice where contiguous and causal, as those of a rank's own come home beside those of others
    """
    numbers, half = 2 * job.heads_k * job.head_dim, job.causal and job.sharding == "zigzag"
    first = (0.5, 0.5) if job.causal else (1.0, 0.0)
    gradients = 0 if what == "forward" else 2 if job.causal and not half else 1
    behind = job.itemsize + gradients * job.accumulator
    kinds = [(*first, job.itemsize), (0.5 if half else 1.0, 0.0, behind)]
    pair = FLOPS[what] * job.heads * job.head_dim / device.rate(1, 1, False, what)
    longest = 0.0
    for a, b, width in kinds:
        square, linear = pair * a, pair * b - numbers * width / link.bandwidth
        longest = max(longest, (sqrt(linear**2 + 4 * square * link.latency) - linear) / (2 * square))
    return longest
