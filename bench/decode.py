"""The decode suite: one new token of each sequence against a cache of keys, checked, then timed.

    bytes = batch * heads_k * seqlen_k * (head_dim + head_dim_v) * itemsize    keys and values, each read once
    share = bytes / time / rate of a copy                                      bench/bandwidth.py

All sequences of a case have the same length, so that peers without lengths serve it. A call takes copies of its cache
in turn, more of them together than the machine's own caches hold: each is read from memory, as in a model of many
layers. The scales of a float8 cache are powers of two, so that its keys and values are exact in every dtype, and the
oracle has the same ones.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import cases as shapes
from bench import measure as meter
from bench.bandwidth import copies, copy, in_turn, replayed
from bench.cases import Case
from bench.check import Expected, expect, poison
from bench.peers import Attention, Peer
from bench.record import Record, Row
from bench.trial import LATE, Settings, failure, gate

CHECKED = 4  # sequences that are compared with the oracle, from the first to the last
ROOM = 0.6  # of the free memory that a cache may take; the rest is for making it and for checking a few sequences
CACHE_DTYPES = {"fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Operands:
    """One call's operands, as `flash.decode.flash_attention_decode` names them."""

    q: Tensor  # [batch, heads, 1, head_dim]
    k_cache: Tensor  # [batch, heads_k, seqlen_k, head_dim] or [pages, heads_k, page_size, head_dim]
    v_cache: Tensor
    cache_seqlens: Tensor  # int32 [batch]
    block_table: Tensor | None = None  # int32 [batch, pages of a sequence]
    k_scale: Tensor | None = None  # float32 [heads_k]
    v_scale: Tensor | None = None


def page_size(case: Case) -> int:
    """Keys of a page; 0 where the cache has none."""
    kind, _, size = case.cache.partition(" ")
    return int(size) if kind == "paged" else 0


def cache_dtype(case: Case) -> torch.dtype:
    """What keys and values are stored as."""
    own: torch.dtype = getattr(torch, case.dtype)
    return CACHE_DTYPES.get(case.cache, own)


def cache_bytes(case: Case) -> int:
    """Bytes of the keys and values of every sequence."""
    numbers = case.batch * case.heads_k * case.seqlen_k * (case.head_dim + case.head_dim_v)
    return numbers * cache_dtype(case).itemsize


def gigabytes_per_second(case: Case, row: Row) -> float | None:
    """The rate at which a row read its cache, in 1e9 bytes a second; None without a timing."""
    return None if row.latency is None else cache_bytes(case) / row.latency.median / 1e6


def operands(case: Case, device: torch.device, seed: int) -> list[Operands]:
    """Standard normal q and caches, and the same again at other addresses, as many as are taken in turn."""
    generator = torch.Generator(device).manual_seed(seed)
    count, size = copies(cache_bytes(case), device), page_size(case)
    paged = -(-case.seqlen_k // size) if size else 1  # pages of a sequence
    numbers, rows = case.batch * paged, size or case.seqlen_k

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    def stored(head_dim: int, scale: Tensor) -> Tensor:
        x = normal(numbers, case.heads_k, rows, head_dim)
        if case.cache in CACHE_DTYPES:
            x = x.div_(scale[:, None, None]).to(cache_dtype(case))
        return x if count == 1 else x.repeat(count, 1, 1, 1)

    q = normal(case.batch, case.heads, 1, case.head_dim)
    head = torch.arange(case.heads_k, device=device)
    k_scale, v_scale = torch.exp2(-4.0 - head % 3), torch.exp2(-3.0 - head % 2)
    k_cache, v_cache = stored(case.head_dim, k_scale), stored(case.head_dim_v, v_scale)
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)
    scales = {"k_scale": k_scale, "v_scale": v_scale} if case.cache in CACHE_DTYPES else {}
    table = torch.randperm(numbers, generator=generator, device=device).to(torch.int32).view(case.batch, paged)
    found = []
    for start in range(0, count * numbers, numbers):
        if size:
            found.append(Operands(q, k_cache, v_cache, lengths, table + start, **scales))
        else:
            k, v = (x[start : start + numbers] for x in (k_cache, v_cache))
            found.append(Operands(q, k, v, lengths, **scales))
    return found


def contiguous(case: Case, held: Operands, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values of some sequences, [sequences, heads_k, seqlen_k, ..] in the case's dtype, by indexing alone."""
    found = []
    for cache, scale in ((held.k_cache, held.k_scale), (held.v_cache, held.v_scale)):
        if held.block_table is not None:  # [sequences, pages, heads_k, page_size, ..]
            x = cache[held.block_table[list(sequences)].long()].transpose(1, 2).flatten(2, 3)[:, :, : case.seqlen_k]
        else:
            x = torch.stack([cache[b].to(held.q.dtype) for b in sequences])  # float8 is not indexed everywhere
        found.append(x if scale is None else x * scale[:, None, None].to(x.dtype))
    return found[0], found[1]


@dataclass(frozen=True)
class Reference:
    """What a case's results are held to.

    Args:
        case: the case of the compared sequences alone.
        sequences: which they are.
        expected: their o by the oracle, with bounds.
    """

    case: Case
    sequences: list[int]
    expected: Expected


def reference(case: Case, held: Operands) -> Reference:
    """Runs the oracle and standard attention on some sequences."""
    count = min(case.batch, CHECKED)
    sequences = [n * (case.batch - 1) // max(count - 1, 1) for n in range(count)]
    few = replace(case, batch=count)
    q = held.q[sequences]
    expected = expect(few, q, *contiguous(case, held, sequences), q, backward=False)
    which = "every sequence" if count == case.batch else f"sequences {', '.join(map(str, sequences))}"
    extent = f"{which}, {expected.extent}; nothing anywhere NaN or infinite"
    return Reference(few, sequences, replace(expected, extent=extent))


def compared(o: Tensor, sequences: Sequence[int]) -> Tensor:
    """o of the sequences that the oracle has; all NaN where any sequence has a NaN or an infinity."""
    return torch.where(o.isfinite().all(), o[list(sequences)], float("nan"))


def measure(case: Case, peer: Peer, held: Sequence[Operands], wanted: Reference, settings: Settings) -> Row:
    """Checks a peer on a case, then times it if it was right."""
    row = Row(case.name, peer.name, "forward")
    if time.monotonic() > settings.deadline:
        return replace(row, outcome="skipped", reason=LATE)
    try:
        prepared: AbstractContextManager[Attention] = peer.prepare(case, settings.device)
        with prepared as attention, torch.no_grad():
            poison((held[0].q,))
            row = gate(wanted.case, row, lambda: (compared(attention(held[0]), wanted.sequences),), wanted.expected)
            if row.outcome != "ok":
                return row
            call = in_turn([lambda x=x: attention(x) for x in held])  # type: ignore[misc]
            took = replayed(call, settings.device, settings.effort)
    except Exception as error:  # to import, to compile, to be captured: whatever fails is the peer's result
        return failure(row, error)
    return replace(row, latency=took, tflops=shapes.flops(case, "forward") / took.median / 1e9)


def too_large(case: Case, device: torch.device) -> str:
    """Why a case is not begun; "" where its cache fits."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself counts as taken otherwise
        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        free = meter.available_memory()
    needed = cache_bytes(case)
    if free is None or needed <= ROOM * free:
        return ""
    return f"not started: its cache takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def missing(record: Record, case: Case, peer: Peer) -> bool:
    """Whether a record has no row of a case and a peer, or one that was never begun."""
    row = record.row(case.name, peer.name, "forward")
    return row is None or row.outcome == "skipped"


def time_all(
    record: Record, cases: Sequence[Case], peers: Sequence[Peer], settings: Settings, step: Callable[[str], None],
    finished: Callable[[Case], None],
) -> None:  # fmt: skip
    """The rate of a copy in this run, then every peer on every case; finished(case) is called after each. What a record
    has stays.
    """
    record.speed.setdefault("copies", []).append(copy(settings.device))
    for case in cases:
        record.cases.setdefault(case.name, case)
        left = [peer for peer in peers if missing(record, case, peer)]
        for row in time_case(record, case, left, settings):
            record.add([row])
            step(f"{case.name}, {row.peer}")
        finished(case)


def time_case(record: Record, case: Case, peers: Sequence[Peer], settings: Settings) -> Iterator[Row]:
    """A row of each peer; operands are made, and the oracle asked, where one is there and time and memory allow it."""
    present = []
    for peer in peers:
        if reason := peer.absent(case, settings.device):
            yield Row(case.name, peer.name, "forward", "absent", reason)
        else:
            present.append(peer)
    if not present:
        return
    late = time.monotonic() > settings.deadline
    outcome, why = ("skipped", LATE) if late else ("oom", too_large(case, settings.device))
    if not why:
        try:
            held = operands(case, settings.device, settings.seed)
            wanted = reference(case, held[0])
        except Exception as error:
            if not meter.out_of_memory(error):
                raise
            why = f"making it: {(str(error).splitlines() or ['out of memory'])[0]}"
    if why:
        yield from (Row(case.name, peer.name, "forward", outcome, why) for peer in present)
        return
    record.checked[case.name] = wanted.expected.extent
    for peer in present:
        yield measure(case, peer, held, wanted, settings)
