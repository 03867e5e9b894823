"""PagedCache: whatever sequences do, each reads back through its table what was appended to it, and to it alone."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from flash import flash_attention, flash_attention_decode
from flash.kernels.spec import Config
from flash.paged import Batch, OutOfPages, PagedCache

LAYERS = 2


def made(pages: int = 8, page_size: int = 4, **options: Any) -> PagedCache:
    sizes: dict[str, Any] = dict(layers=LAYERS, heads_k=2, head_dim=1, head_dim_v=3, dtype=torch.float64)
    return PagedCache(pages, page_size, **{**sizes, **options})


def append(cache: PagedCache, batch: Batch, values: list[list[int]]) -> None:
    """Write keys as the layers do, through a step's lengths and table: key, layer and head make up the number."""
    for length, table, new in zip(batch.cache_seqlens.tolist(), batch.block_table.tolist(), values, strict=True):
        for position, value in enumerate(new, length):
            page, row = table[position // cache.page_size], position % cache.page_size
            assert page >= 0
            for x in (cache.k, cache.v):
                layers, _, heads, _, _ = x.shape
                x[:, page, :, row] = value + torch.arange(layers * heads).view(layers, heads, 1) / 8


def contents(cache: PagedCache, sequence: int, start: int = 0) -> list[int]:
    """What a sequence, trimmed to start, holds from its first page on, read through a table; each head its own."""
    batch = cache.prepare([sequence], 0)
    (length,), (table,) = batch.cache_seqlens.tolist(), batch.block_table.tolist()
    assert length == cache.length(sequence) and len(table) == -(-length // cache.page_size)
    gone = start // cache.page_size
    assert set(table[:gone]) <= {-1} and min(table[gone:], default=0) >= 0
    found: list[Any] = []
    for x in (cache.k, cache.v):
        layers, _, heads, _, d = x.shape
        rows = x[:, table[gone:]].transpose(2, 3).flatten(1, 2)[:, : length - gone * cache.page_size]
        values = rows[0, :, 0, 0]  # of rows [layers, positions, heads, d]
        want = values[:, None, None] + torch.arange(layers * heads).view(layers, 1, heads, 1) / 8
        assert torch.equal(rows, want.expand(-1, -1, -1, d))
        found.append(values.to(torch.int64).tolist())
    assert found[0] == found[1]
    return found[0]  # type: ignore[no-any-return]


class Generations(RuleBasedStateMachine):
    """A cache beside a dict of lists."""

    sequences = Bundle("sequences")

    @initialize(pages=st.integers(1, 9), page_size=st.integers(1, 5))
    def start(self, pages: int, page_size: int) -> None:
        self.cache, self.pages = made(pages, page_size), pages
        self.lists: dict[int, list[int]] = {}
        self.starts: dict[int, int] = {}
        self.written = 0

    @rule(target=sequences)
    def allocate(self) -> int:
        sequence = self.cache.allocate()
        assert sequence not in self.lists
        self.lists[sequence], self.starts[sequence] = [], 0
        return sequence

    @rule(data=st.data(), batch=st.lists(sequences, min_size=1, max_size=4, unique=True), wide=st.integers(0, 2))
    def step(self, data: st.DataObject, batch: list[int], wide: int) -> None:
        one_each = st.lists(st.integers(0, 7), min_size=len(batch), max_size=len(batch))
        new = data.draw(st.integers(0, 7) | one_each)
        counts = [new] * len(batch) if isinstance(new, int) else new
        values = [list(range(self.written + 10 * i, self.written + 10 * i + n)) for i, n in enumerate(counts)]
        self.written += 10 * len(batch)
        after = {**self.lists, **{s: self.lists[s] + more for s, more in zip(batch, values, strict=True)}}
        lengths = [len(after[s]) for s in batch]
        columns = wide + max(-(-length // self.cache.page_size) for length in lengths) if wide else None
        tables = {s: self.cache.pages(s) for s in self.lists}
        free = self.cache.free_pages
        try:
            step = self.cache.prepare(batch, new, max_pages=columns)
        except OutOfPages:
            assert {s: self.cache.pages(s) for s in self.lists} == tables and self.cache.free_pages == free
            assert self.needed(batch, counts) > free
            return
        assert self.cache.free_pages == free - self.needed(batch, counts, tables)
        assert step.cache_seqlens.tolist() == [len(self.lists[s]) for s in batch]
        assert step.cache_seqlens.dtype == step.block_table.dtype == torch.int32
        assert columns is None or step.block_table.shape == (len(batch), columns)
        append(self.cache, step, values)
        self.lists = after

    def needed(
        self, batch: list[int], counts: list[int], tables: dict[int, tuple[int, ...]] | None = None
    ) -> int:  # counted one sequence after the other, on tables of before
        tables = {s: self.cache.pages(s) for s in self.lists} if tables is None else tables
        owners = Counter(page for table in tables.values() for page in table)
        pages = 0
        for sequence, n in zip(batch, counts, strict=True):
            table, length = tables[sequence], len(self.lists[sequence])
            pages += -(-(length + n) // self.cache.page_size) - len(table)
            if n and length % self.cache.page_size and owners[table[-1]] > 1:
                owners[table[-1]] -= 1
                pages += 1
        return pages

    @rule(target=sequences, data=st.data(), sequence=sequences)
    def fork(self, data: st.DataObject, sequence: int) -> Any:
        if len(self.lists) > 6:
            return multiple()
        length = data.draw(st.none() | st.integers(self.starts[sequence], len(self.lists[sequence])))
        free = self.cache.free_pages
        forked = self.cache.fork(sequence, length)
        assert forked not in self.lists and self.cache.free_pages == free
        self.lists[forked], self.starts[forked] = self.lists[sequence][:length], self.starts[sequence]
        return forked

    @rule(data=st.data(), sequence=sequences)
    def rewind(self, data: st.DataObject, sequence: int) -> None:
        length = data.draw(st.integers(self.starts[sequence], len(self.lists[sequence])))
        self.cache.rewind(sequence, length)
        del self.lists[sequence][length:]

    @rule(data=st.data(), sequence=sequences)
    def trim(self, data: st.DataObject, sequence: int) -> None:
        start = data.draw(st.integers(0, len(self.lists[sequence])))
        tables = {s: self.cache.pages(s) for s in self.lists if s != sequence}
        self.cache.trim(sequence, start)
        self.starts[sequence] = max(self.starts[sequence], start)
        assert {s: self.cache.pages(s) for s in tables} == tables
        if self.starts[sequence]:
            for below in (self.cache.rewind, self.cache.fork):
                with pytest.raises(ValueError, match=f"length must be {self.starts[sequence]} to"):
                    below(sequence, self.starts[sequence] - 1)

    @rule(sequence=consumes(sequences))
    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.lists[sequence]
        with pytest.raises(ValueError, match="sequence"):
            self.cache.length(sequence)

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        for sequence, values in getattr(self, "lists", {}).items():
            first = self.starts[sequence] // self.cache.page_size * self.cache.page_size
            assert contents(self.cache, sequence, self.starts[sequence]) == values[first:]

    @invariant()
    def every_page_is_free_or_used(self) -> None:
        if hasattr(self, "cache"):
            tables = [[page for page in self.cache.pages(s) if page >= 0] for s in self.lists]
            assert self.cache.used_pages == len(set().union(*tables)) == self.pages - self.cache.free_pages
            for table in tables:
                assert len(set(table)) == len(table)

    def teardown(self) -> None:
        for sequence in list(getattr(self, "lists", ())):
            self.cache.free(sequence)
        if hasattr(self, "cache"):
            assert self.cache.free_pages == self.pages and self.cache.used_pages == 0


TestGenerations = Generations.TestCase
TestGenerations.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


def test_a_shared_page_is_copied_by_who_writes_first_and_never_for_the_last() -> None:
    cache = made(8, 4)
    one = cache.allocate()
    append(cache, cache.prepare([one], 6), [[*range(6)]])
    two, three = cache.fork(one), cache.fork(one, 5)
    assert cache.used_pages == 2 and cache.pages(one) == cache.pages(two) == cache.pages(three)
    shared = cache.pages(one)[1]
    append(cache, cache.prepare([two], 1), [[7]])
    assert cache.pages(one)[1] == cache.pages(three)[1] == shared != cache.pages(two)[1]
    append(cache, cache.prepare([three, one], 1), [[8], [9]])
    assert cache.pages(one)[1] == shared and cache.used_pages == 4
    assert [contents(cache, s) for s in (one, two, three)] == [[*range(6), 9], [*range(6), 7], [*range(5), 8]]


def test_a_fork_outlives_what_it_came_from() -> None:
    cache = made(4, 2)
    one = cache.allocate()
    append(cache, cache.prepare([one], 3), [[1, 2, 3]])
    two = cache.fork(one)
    cache.free(one)
    assert cache.used_pages == 2
    append(cache, cache.prepare([two], 1), [[4]])
    assert contents(cache, two) == [1, 2, 3, 4] and cache.used_pages == 2  # the only owner writes in place


def test_pages_behind_a_start_are_given_back_and_forks_keep_theirs() -> None:
    cache = made(4, 4)
    one = cache.allocate()
    append(cache, cache.prepare([one], 11), [[*range(11)]])
    two = cache.fork(one)
    cache.trim(one, 7)  # one page is wholly before it
    assert cache.pages(one) == (-1, *cache.pages(two)[1:]) and cache.length(one) == 11 and cache.used_pages == 3
    three = cache.fork(one, 8)
    cache.trim(two, 8)
    cache.trim(two, 3)  # not undone
    assert cache.pages(two) == (-1, -1, cache.pages(one)[2]) and cache.used_pages == 2
    with pytest.raises(ValueError, match="length must be 7 to 8, from where it was trimmed"):
        cache.rewind(three, 6)
    append(cache, cache.prepare([two, three], 1, max_pages=4), [[11], [12]])  # two copies, three takes a page
    assert contents(cache, one, 7) == [*range(4, 11)] and contents(cache, three, 7) == [4, 5, 6, 7, 12]
    assert contents(cache, two, 8) == [8, 9, 10, 11]
    for sequence in (one, two, three):
        cache.free(sequence)
    assert cache.free_pages == 4


def test_a_sequence_may_be_trimmed_to_its_end() -> None:
    cache = made(1, 4)
    one = cache.allocate()
    for first in (0, 4, 8):  # one page does for any length
        append(cache, cache.prepare([one], 4), [[*range(first, first + 4)]])
        cache.trim(one, first + 4)
        assert cache.free_pages == 1
    cache.rewind(one, 12)
    assert contents(cache, one, 12) == [] and cache.pages(one) == (-1, -1, -1)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_a_window_needs_three_pages_of_half_its_keys_however_long_a_sequence(
    backend: str, device: torch.device
) -> None:
    window, length = (7, 0), 29
    cache = made(6, 4, layers=1, head_dim=8, head_dim_v=4, device=device)
    for x in (cache.k, cache.v):
        x.fill_(torch.nan)  # as written, where the interpreter's checker asks
    config = Config(16, 16, 4, 1) if backend == "triton" else None
    q, k, v = (torch.randn(2, h, length, d, dtype=torch.float64, device=device) for h, d in ((4, 8), (2, 8), (2, 4)))
    for x in (q, k, v):
        x[1, :, :6] = x[0, :, :6]  # what the fork shares
    want = flash_attention(q, k, v, causal=True, window=window, backend="torch")

    def step(sequences: list[int], start: int, stop: int) -> None:
        at = slice(len(sequences)), slice(None), slice(start, stop)
        where = cache.prepare(sequences, stop - start)._asdict()
        o = flash_attention_decode(
            q[at], cache.k[0], cache.v[0], k=k[at], v=v[at], window=window, backend=backend, config=config, **where
        )
        torch.testing.assert_close(o, want[at], rtol=1e-12, atol=1e-12)
        for sequence in sequences:
            cache.trim(sequence, max(0, stop - 7))
            assert sum(page >= 0 for page in cache.pages(sequence)) <= 3
        used = {page for sequence in sequences for page in cache.pages(sequence)}
        for x in (cache.k, cache.v):
            x[:, [page for page in range(6) if page not in used]] = torch.nan

    one = cache.allocate()
    step([one], 0, 6)
    answers = [one, cache.fork(one)]
    for start in range(6, length):
        step(answers, start, start + 1)
    assert cache.pages(one)[:5] == (-1,) * 5


def test_a_batch_without_sequences_is_prepared() -> None:
    batch = made().prepare([], 1)
    assert batch.cache_seqlens.shape == (0,) and batch.block_table.shape == (0, 0)


def test_a_page_holds_the_rows_of_a_head_one_after_the_other() -> None:
    cache = made(3, 4, dtype=torch.float8_e4m3fn)
    assert cache.k.shape == (LAYERS, 3, 2, 4, 1) and cache.v.shape == (LAYERS, 3, 2, 4, 3)
    assert cache.k.is_contiguous() and cache.v.is_contiguous() and cache.v.dtype == torch.float8_e4m3fn
    one = cache.allocate()
    cache.prepare([one], 1)
    cache.v[:, cache.pages(one)[0]] = 2.0
    cache.prepare([cache.fork(one)], 1)  # copies a page of float8
    assert bool((cache.v[:, [0, 1]].float() == 2).all())


def test_nothing_is_read_from_the_device() -> None:
    """A tensor on "meta" has nothing to read."""
    cache = made(8, 4, device="meta")
    one = cache.allocate()
    cache.prepare([one], 6)
    two = cache.fork(one, 5)
    batch = cache.prepare([one, two], 1)  # copies a page
    cache.rewind(one, 2)
    cache.free(two)
    assert batch.block_table.shape == (2, 2) and batch.cache_seqlens.is_meta and cache.used_pages == 1


def test_numbers_are_never_given_again() -> None:
    cache = made()
    one = cache.allocate()
    cache.free(one)
    assert cache.allocate() != one and cache.fork(cache.allocate()) not in (one, one + 1)


def call_errors() -> dict[str, Any]:
    """What is wrong, and who asks for it of a cache of 8 pages of 4, its sequence 0 of 5 keys."""
    return {
        "sequence": [
            lambda c: c.prepare([0, 1], 1),
            lambda c: c.free(1),
            lambda c: c.fork(-1),
            lambda c: c.rewind(7, 0),
            lambda c: c.trim(7, 0),
            lambda c: c.length(1),
            lambda c: c.pages(1),
        ],
        "sequences must differ": [lambda c: c.prepare([0, 0], 1)],
        "new must be": [lambda c: c.prepare([0], -1), lambda c: c.prepare([0], [1, 1]), lambda c: c.prepare([0], [-1])],
        "max_pages must be at least 3": [lambda c: c.prepare([0], 4, max_pages=2)],
        "start must be 0 to 5": [lambda c: c.trim(0, 6), lambda c: c.trim(0, -1)],
        "length must be 0 to 5": [
            lambda c: c.rewind(0, 6), lambda c: c.rewind(0, -1), lambda c: c.fork(0, 6), lambda c: c.fork(0, -1)
        ],
    }  # fmt: skip


@pytest.mark.parametrize("message", call_errors())
def test_wrong_calls_are_named_and_change_nothing(message: str) -> None:
    for call in call_errors()[message]:
        cache = made()
        one = cache.allocate()
        append(cache, cache.prepare([one], 5), [[*range(5)]])
        with pytest.raises(ValueError, match=message):
            call(cache)
        assert contents(cache, one) == [*range(5)] and cache.used_pages == 2


def test_out_of_pages_says_how_many_and_changes_nothing() -> None:
    cache = made(3, 4)
    one, two = cache.allocate(), cache.allocate()
    append(cache, cache.prepare([one], 5), [[*range(5)]])
    with pytest.raises(OutOfPages, match="2 more pages are needed and 1 of 3 are free"):
        cache.prepare([one, two], [4, 1])  # room for either
    assert cache.length(one) == 5 and cache.length(two) == 0 and cache.free_pages == 1
    assert issubclass(OutOfPages, RuntimeError)
    cache.prepare([two], 4)


SIZES = ["pages", "page_size", "layers", "heads_k", "head_dim", "head_dim_v"]
INTEGERS: dict[str, list[Any]] = {
    "sequence": [
        lambda c, n: c.length(n),
        lambda c, n: c.pages(n),
        lambda c, n: c.rewind(n, 0),
        lambda c, n: c.fork(n),
        lambda c, n: c.trim(n, 0),
        lambda c, n: c.free(n),
    ],
    "sequences": [lambda c, n: c.prepare(n, 1), lambda c, n: c.prepare([n], 1)],
    "new": [lambda c, n: c.prepare([0], n), lambda c, n: c.prepare([0], [n])],
    "max_pages": [lambda c, n: c.prepare([0], 1, max_pages=n)],
    "length": [lambda c, n: c.fork(0, n), lambda c, n: c.rewind(0, n)],
    "start": [lambda c, n: c.trim(0, n)],
    **{name: [lambda c, n, name=name: made(**{name: n})] for name in SIZES},
}
WRONG = {
    "float": (1.0, "got 1.0"),
    "fraction": (1.5, "got 1.5"),
    "bool": (True, "got True"),
    "str": ("1", "got '1'"),
    "numpy bool": (np.True_, r"got (np\.)?True"),
    "tensor": (torch.tensor(1), r"\.item\(\).*\.tolist\(\)"),
    "tensor of one": (torch.tensor([1]), r"\.item\(\).*\.tolist\(\)"),
    "device tensor": (torch.tensor(1, device="meta"), r"\.item\(\).*\.tolist\(\)"),
}


def with_two_sequences() -> PagedCache:
    """Sequence 0 with 5 keys, and 1, which True and 1.0 would find in a dict."""
    cache = made()
    append(cache, cache.prepare([cache.allocate()], 5), [[*range(5)]])
    cache.allocate()
    return cache


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_int_is_named_and_changes_nothing(name: str, value: str) -> None:
    wrong, came = WRONG[value]
    for call in INTEGERS[name]:
        cache = with_two_sequences()
        with pytest.raises(ValueError, match=rf"^{name}(\[0\])? must be .*{came}"):
            call(cache, wrong)
        assert contents(cache, 0) == [*range(5)] and cache.length(1) == 0 and cache.used_pages == 2


def test_one_sequence_in_place_of_several_is_named() -> None:
    with pytest.raises(ValueError, match="^sequences must be a list of ints, got 0"):
        with_two_sequences().prepare(0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("list_of", [list, tuple, iter, np.array])
def test_integers_of_numpy_and_of_any_iterable_pass(list_of: Any) -> None:
    cache = made(*np.array([8, 4]), layers=np.int32(LAYERS))
    one = cache.allocate()
    append(cache, cache.prepare(list_of([one]), list_of([6]), max_pages=np.int64(3)), [[*range(6)]])
    cache.prepare([np.int64(one)], np.uint8(1))
    cache.rewind(np.int32(one), np.int64(5))
    assert type(cache.length(one)) is type(cache.page_size) is int and contents(cache, one) == [*range(5)]


def test_a_number_that_changes_after_the_call_changes_no_sequence() -> None:
    cache, length, new = with_two_sequences(), np.array(2), [np.array(3)]
    cache.rewind(0, length)  # type: ignore[arg-type]
    cache.prepare([1], new)  # type: ignore[arg-type]
    length += 2
    new[0] += 2
    assert cache.length(0) == 2 and cache.length(1) == 3


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        made(**{name: 0})
