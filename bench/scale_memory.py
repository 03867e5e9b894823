"""What a rank holds during a call of ring_attention, and the tokens that fit in the memory of so many devices.

Bytes by name, read off the code: a phase is what is alive at a time, and the largest one counts. Left out is what an
allocator wastes; what the CPU's kernels work with, `workspace`, counts on a CPU alone. `phases` leaves out q, k, v,
their output and its gradient too: a layer of a network has these whether or not the sequence is sharded.

    tokens that fit = most tokens with  layers (q, k, v, o, lse) + do + the largest phase of one layer <= memory
"""

from dataclasses import replace

from bench.scale import Job, call_of, own_numbers, steps_of, unserved, ways
from flash import ulysses
from flash.tiling import NARROW_BYTES

STANDARD = "standard"  # attention that holds its scores, rows sharded and all keys fetched
MATRICES = {"forward": 2, "backward": 3}  # of scores, that it works on
MOST = 2**40  # tokens


def rows_and_keys(job: Job, rank: int) -> tuple[int, int]:
    """How many a rank has."""
    _, layout = call_of(job)
    return tuple(sum(p.stop - p.start for p in x[rank]) for x in (layout.queries, layout.keys))  # type: ignore[return-value]


def saved(job: Job, rank: int) -> dict[str, int]:
    """What a rank keeps of a layer for the backward pass."""
    rows, keys = rows_and_keys(job, rank)
    q = rows * job.heads * job.head_dim * job.itemsize
    lse = rows * job.heads * job.accumulator
    return {"q": q, "k and v": 2 * keys * job.heads_k * job.head_dim * job.itemsize, "o": q, "lse": lse}


def phases(job: Job, what: str, rank: int) -> list[dict[str, int]]:
    """What is alive at a time on a rank, beside q, k, v, o, lse and do; first of all while the kernels run."""
    if job.method == STANDARD:
        rows, keys = rows_and_keys(job, rank)
        scores = rows * job.keys * job.heads * job.itemsize
        gathered = 2 * job.keys * job.heads_k * job.head_dim * job.itemsize
        return [{"scores": MATRICES[what] * scores, "keys of all": gathered * (1 + (what == "backward"))}]
    return {"ring": of_the_ring, "all_gather": of_all_gather, "ulysses": of_ulysses}[job.method](job, what, rank)


def worst(job: Job, what: str) -> dict[str, int]:
    """The largest phase of any rank."""
    every = [phase for rank in range(job.world_size) for phase in phases(job, what, rank)]
    return max(every, key=lambda phase: sum(phase.values()))


def sums_of(job: Job, what: str, rank: int) -> tuple[int, int, dict[str, int]]:
    """Numbers of q and of k and v; and what the ring and all_gather hold of their results until a pass ends."""
    rows, _ = rows_and_keys(job, rank)
    q, kv, a = rows * job.heads * job.head_dim, own_numbers(job)[rank], job.accumulator
    if what == "forward":
        return q, kv, {"sums of o and lse": (q + rows * job.heads) * a}
    return q, kv, {"sums of dq, dk, dv": (q + kv) * a}


def pieces(job: Job) -> int:
    """In how many a shard lies."""
    return 2 if job.sharding == "zigzag" else 1


def of_the_ring(job: Job, what: str, rank: int) -> list[dict[str, int]]:
    """Own keys packed, those that are here and those that come; backward the gradients behind them as well."""
    q, kv, sums = sums_of(job, what, rank)
    e, a, count = job.itemsize, job.accumulator, pieces(job)
    hops = sum(way.hops for way in ways(job))
    travels = {"own keys, packed": kv * e * bool(hops), "keys here and coming": min(hops, 2) * kv * e}
    if what == "forward":
        part = {"o and lse of a part": sums["sums of o and lse"] // count}
        return [sums | travels | part, sums | {"last keys": kv * e * bool(hops), "o": q * e}]
    # a share at work, the one before on its way, and one coming
    way = {"gradients here, leaving and coming": (0, 1, 3, 3)[min(hops, 3)] * kv * a}
    loop = sums | travels | {"dk, dv of its own": kv * a} | way | {"dq, dk, dv of a part": (q + kv) * a // count}
    return [loop, sums | {"dq, dk, dv": (q + kv) * e}]


def of_all_gather(job: Job, what: str, rank: int) -> list[dict[str, int]]:
    """Keys of all ranks that it sees, as they came and side by side; backward their gradients twice."""
    q, kv, sums = sums_of(job, what, rank)
    _, layout = call_of(job)
    e, a, count, sizes = job.itemsize, job.accumulator, pieces(job), own_numbers(job)
    seen = sum(sizes[source] for source in range(job.world_size) if layout.needs[rank][source])
    fetched = {"keys as they came": seen * e, "keys side by side": seen * e}
    if what == "forward":
        part = {"o and lse of a part": sums["sums of o and lse"] // count}
        return [sums | fetched | part, sums | {"keys side by side": seen * e, "o": q * e}]
    shares = {"gradients by rank": seen * a, "gradients side by side": seen * a}
    part = {"dq of a part": q * a // count, "dk, dv of a part": seen * a}
    senders = sum(layout.needs[peer][rank] for peer in range(job.world_size))
    arrived = {"gradients that arrived": senders * kv * a, "dk, dv of its own": kv * a, "keys side by side": seen * e}
    return [sums | fetched | shares | part, sums | shares | arrived, sums | {"dq, dk, dv": (q + kv) * e}]


def of_ulysses(job: Job, what: str, rank: int) -> list[dict[str, int]]:
    """All rows of some heads, and what is cut out and put together for the exchange."""
    call, _ = call_of(job)
    heads, e, a, d = ulysses.heads_of(call, job.world_size), job.itemsize, job.accumulator, job.head_dim
    own = heads[rank]
    rows, _ = rows_and_keys(job, rank)
    q, kv = rows * job.heads * d, own_numbers(job)[rank]
    whole_q = job.rows * (own.q.stop - own.q.start) * d
    whole_kv = 2 * job.keys * (own.k.stop - own.k.start) * d
    operands = {"q, k, v of its heads": (whole_q + whole_kv) * e}
    if what == "forward":
        computing = operands | {"o of its heads": whole_q * e}
        return [computing, {"o of its heads": whole_q * e, "o": q * e, "o cut out and come": (q + whole_q) * e}]
    operands |= {"o and do of its heads": 2 * whole_q * e, "dq, dk, dv of its heads": (whole_q + whole_kv) * e}
    copy = whole_q * a if a != e else 0
    home = {"sum of dq": q * a, "dq cut out and come": whole_q * a + q * a, "dq as sums are": copy}
    done = {"dq": q * e, "sum of dk": kv * a // 2, "dk cut out and come": (whole_kv * a + kv * a) // 2}
    return [operands, operands | home, operands | done]


def workspace(job: Job, what: str) -> int:
    """Bytes of copies and results that the CPU's kernels work with at most, as flash/fused.py cuts a call."""
    found = 0
    for block in (b for step in steps_of(job, what) for own in step.blocks for b in own):
        row = job.head_dim * job.accumulator
        heads = min(block.heads_k, max(1, NARROW_BYTES // (max(block.rows, block.keys) * row)))
        of_rows, of_keys = (2, 2) if what == "forward" else (5, 6)
        found = max(found, heads * row * (of_rows * block.rows + of_keys * block.keys))
    return found


def peak(job: Job, what: str) -> int:
    """Bytes of a rank on a CPU beyond q, k, v and do: of the forward pass, or of "both", where o and lse are kept."""

    def of_pass(name: str) -> int:
        every = [phases(job, name, rank) for rank in range(job.world_size)]
        computing = max(sum(first.values()) for first, *_ in every) + workspace(job, name)
        return max(computing, *(sum(phase.values()) for _, *others in every for phase in others))

    if what == "forward":
        return of_pass("forward")
    kept = max(saved(job, rank)["o"] + saved(job, rank)["lse"] for rank in range(job.world_size))
    return max(of_pass("forward"), kept + of_pass("backward"))


def resident(job: Job, layers: int) -> int:
    """Bytes of a rank: what the layers keep, and what one of them works with."""
    kept = max(sum(saved(job, rank).values()) for rank in range(job.world_size))
    scores = 0
    if job.method == STANDARD:
        rows, _ = rows_and_keys(job, 0)
        scores = rows * job.keys * job.heads * job.itemsize
    do = max(saved(job, rank)["o"] for rank in range(job.world_size))
    working = max(sum(worst(job, what).values()) for what in ("forward", "backward"))
    return layers * (kept + scores) + do + working


def tokens_that_fit(job: Job, memory: float, layers: int) -> int | None:
    """The longest sequence, in multiples of 2 * world_size; None where the method does not serve so many ranks."""
    unit = 2 * job.world_size
    if job.method != STANDARD and unserved(replace(job, keys=unit)):
        return None

    def fits(count: int) -> bool:
        return resident(replace(job, keys=count * unit), layers) <= memory

    low, high = 0, 1
    while fits(high) and high * unit < MOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit
