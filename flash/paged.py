"""PagedCache: the keys and values of a generation's sequences, in pages that they take as they grow, and may share.

Which sequence has which pages is bookkeeping on the host, in plain Python; nothing here waits for the device. A page is
written by a sequence that has it alone: one that several share is copied first, for the sequence about to write.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_floats, check_sizes, integer


class OutOfPages(RuntimeError):
    """A cache has fewer free pages than a call needs; the call changed nothing."""


class Batch(NamedTuple):
    """Where the keys of a batch's sequences lie: keywords of flash_attention_decode."""

    cache_seqlens: Tensor  # int32 [batch], keys before the append
    block_table: Tensor  # int32 [batch, max_pages], the page of every page_size positions; -1 for none


def integers(name: str, values: Any) -> list[int]:
    """An argument of several numbers, likewise."""
    if isinstance(values, Tensor):
        raise ValueError(f"{name} must be a list of ints, got a tensor: .item() reads one number, .tolist() several")
    try:
        numbers = list(values)
    except TypeError:
        raise ValueError(f"{name} must be a list of ints, got {values!r}") from None
    return [integer(f"{name}[{i}]", number) for i, number in enumerate(numbers)]


class PagedCache:
    """A cache of keys and values for flash_attention_decode, shared by sequences of any lengths that come and go.

        position p of a sequence lies in row p % page_size of its page number p // page_size

        cache = PagedCache(256, layers=2, heads_k=4, head_dim=64, dtype=torch.bfloat16, device="cuda")
        prompt = cache.allocate()
        answers = [prompt, cache.fork(prompt)]      # they share the pages of what is in both
        batch = cache.prepare(answers, 1)           # once a step: one key more each
        for layer in range(2):                      # and each layer appends it
            o = flash_attention_decode(q, cache.k[layer], cache.v[layer], k=k, v=v, **batch._asdict())
        cache.free(answers[0])

    A sequence's number is never given again after `free`; calls with one that is none raise ValueError. If a step fails
    after `prepare`, `rewind` takes back the keys that were never appended. With window=(7, 0) a query sees 8 keys:
    cache.trim(sequence, max(0, cache.length(sequence) - 7)) after a step gives back the pages that none will see again.

    Args:
        pages: how many pages there are, for all sequences together.
        page_size: positions in a page, at least 1. Default: 16.
        layers: a page holds its positions' keys and values of so many layers. Default: 1.
        heads_k: key and value heads.
        head_dim: width of a key.
        head_dim_v: width of a value. Default: head_dim.
        dtype: of keys and values; float8_e4m3fn beside k_scale and v_scale of flash_attention_decode.
        device: where keys, values and tables are. Default: torch's default device.

    Attributes:
        k: [layers, pages, heads_k, page_size, head_dim], not initialised; k[layer] is flash_attention_decode's k_cache.
        v: [layers, pages, heads_k, page_size, head_dim_v], likewise.
        page_size: positions in a page.

    Raises:
        ValueError: a size is no int, or below 1; dtype is no dtype of floats.

    Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention",
        sections 4.1 to 4.4, https://arxiv.org/abs/2309.06180.
    """

    def __init__(
        self,
        pages: int,
        page_size: int = 16,
        *,
        layers: int = 1,
        heads_k: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = dict(
            pages=pages, page_size=page_size, layers=layers, heads_k=heads_k, head_dim=head_dim, head_dim_v=head_dim_v
        )
        pages, page_size, layers, heads_k, head_dim, head_dim_v = check_sizes(sizes).values()
        check_floats(dtype)
        self.page_size = page_size
        self.k = torch.empty(layers, pages, heads_k, page_size, head_dim, dtype=dtype, device=device)
        self.v = torch.empty(layers, pages, heads_k, page_size, head_dim_v, dtype=dtype, device=device)
        self._free = list(reversed(range(pages)))  # the last is taken first
        self._owners = [0] * pages  # sequences that have a page
        self._tables: dict[int, list[int]] = {}  # the pages of a sequence, as many as its length needs
        self._lengths: dict[int, int] = {}
        self._starts: dict[int, int] = {}  # pages wholly before this position are given back, -1 in the table
        self._allocated = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Pages that some sequence has; shared ones count once."""
        return len(self._owners) - len(self._free)

    def allocate(self) -> int:
        """A new sequence, without keys and without pages; returns its number."""
        sequence, self._allocated = self._allocated, self._allocated + 1
        self._tables[sequence], self._lengths[sequence], self._starts[sequence] = [], 0, 0
        return sequence

    def length(self, sequence: int) -> int:
        """The keys of a sequence, with those that `prepare` made room for and those that `trim` gave back."""
        return self._lengths[self._living(sequence)]

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in its order; -1 for one that `trim` gave back."""
        return tuple(self._tables[self._living(sequence)])

    def prepare(self, sequences: Iterable[int], new: int | Iterable[int], *, max_pages: int | None = None) -> Batch:
        """Lengthen sequences by keys that every layer is to append next, and say where they lie.

        Args:
            sequences: the batch, in its order, none of them twice.
            new: how many keys more, for all or one number each; 0 only reads. flash_attention_decode appends as many
                to every sequence of a call.
            max_pages: columns of the table. A CUDA graph needs the same at every step. Default: what the longest of
                the sequences has.

        Returns:
            cache_seqlens, the lengths before, and block_table, both int32 on the cache's device.

        Raises:
            OutOfPages: there are too few free pages; the cache is as it was.
            ValueError: an argument is wrong; the cache is as it was.
        """
        sequences = [self._living(sequence) for sequence in integers("sequences", sequences)]
        several = isinstance(new, Iterable) and not isinstance(new, Tensor)
        added = integers("new", new) if several else [integer("new", new)] * len(sequences)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"sequences must differ, got {sequences}")
        if len(added) != len(sequences) or min(added, default=0) < 0:
            raise ValueError(f"new must be an int >= 0, or a list of {len(sequences)}, got {added if several else new}")
        before = [self._lengths[sequence] for sequence in sequences]
        counts = [self._pages_for(length + more) for length, more in zip(before, added, strict=True)]
        longest = max(counts, default=0)
        columns = longest if max_pages is None else integer("max_pages", max_pages)
        if columns < longest:
            raise ValueError(f"max_pages must be at least {longest}, which the longest sequence needs, got {max_pages}")
        # A last page that is not full gets keys: of several that share it, all but one need a copy.
        writers = Counter(
            self._tables[sequence][-1]
            for sequence, length, more in zip(sequences, before, added, strict=True)
            if more and length % self.page_size
        )
        copies = sum(min(writing, self._owners[page] - 1) for page, writing in writers.items())
        grown = sum(count - len(self._tables[sequence]) for sequence, count in zip(sequences, counts, strict=True))
        if grown + copies > len(self._free):
            raise OutOfPages(
                f"{grown + copies} more pages are needed and {len(self._free)} of {len(self._owners)} are free: "
                f"free or rewind sequences, or make the cache larger"
            )
        for sequence, length, more, count in zip(sequences, before, added, counts, strict=True):
            table = self._tables[sequence]
            if more and length % self.page_size and self._owners[table[-1]] > 1:
                table[-1] = self._copy(table[-1])
            table += [self._take() for _ in range(count - len(table))]
            self._lengths[sequence] = length + more
        tables = [self._tables[sequence] for sequence in sequences]
        rows = [table + [-1] * (columns - len(table)) for table in tables]
        return Batch(self._on_device(before, (len(rows),)), self._on_device(rows, (len(rows), columns)))

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that begins as another one does; nothing is copied before one of them writes.

        Args:
            sequence: the one whose keys are shared.
            length: how many of its keys, at least the start it was trimmed to. Default: all.

        Returns:
            The number of the new sequence, which is trimmed as the other one is.

        Raises:
            ValueError: an argument is wrong.
        """
        sequence = self._living(sequence)
        length = self._kept(sequence, self._lengths[sequence] if length is None else length)
        pages = self._tables[sequence][: self._pages_for(length)]
        for page in pages[self._starts[sequence] // self.page_size :]:
            self._owners[page] += 1
        forked = self.allocate()
        self._tables[forked], self._lengths[forked], self._starts[forked] = pages, length, self._starts[sequence]
        return forked

    def rewind(self, sequence: int, length: int) -> None:
        """Forget all but the first keys of a sequence, as after a rejected draft; pages that it leaves become free.

        Args:
            sequence: which one.
            length: how many keys it keeps, at least the start it was trimmed to.

        Raises:
            ValueError: an argument is wrong.
        """
        sequence = self._living(sequence)
        self._lengths[sequence] = kept = self._kept(sequence, length)  # no less than start: only real pages are left
        table = self._tables[sequence]
        while len(table) > self._pages_for(kept):
            self._leave(table.pop())

    def trim(self, sequence: int, start: int) -> None:
        """Give back the pages wholly before a position, as behind a window; those that no other sequence has are free.

        The sequence keeps its length, and its keys their positions; block_table has -1 for what was given back, and
        flash_attention_decode makes NaN of a query that sees such a key.

        Args:
            sequence: which one.
            start: the first position that a query is still to see, 0 to the sequence's length, also of queries after a
                `rewind`, which like `fork` goes no further back. One behind an earlier start changes nothing.

        Raises:
            ValueError: an argument is wrong.
        """
        sequence, start = self._living(sequence), integer("start", start)
        if not 0 <= start <= self._lengths[sequence]:
            raise ValueError(f"start must be 0 to {self._lengths[sequence]}, the sequence's length, got {start}")
        table, before = self._tables[sequence], self._starts[sequence]
        for i in range(before // self.page_size, start // self.page_size):
            self._leave(table[i])
            table[i] = -1
        self._starts[sequence] = max(before, start)

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other one has become free."""
        sequence = self._living(sequence)
        for page in reversed(self._tables[sequence][self._starts[sequence] // self.page_size :]):
            self._leave(page)
        del self._tables[sequence], self._lengths[sequence], self._starts[sequence]

    def _living(self, sequence: int) -> int:
        number = integer("sequence", sequence)
        if number not in self._lengths:
            raise ValueError(f"sequence must be one that allocate or fork returned and that lives, got {number}")
        return number

    def _kept(self, sequence: int, length: int) -> int:
        kept, start, longest = integer("length", length), self._starts[sequence], self._lengths[sequence]
        if not start <= kept <= longest:
            trimmed = "from where it was trimmed to " if start else ""
            raise ValueError(f"length must be {start} to {longest}, {trimmed}what sequence has, got {kept}")
        return kept

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _take(self) -> int:
        """A free page, for one sequence."""
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _leave(self, page: int) -> None:
        """A sequence has a page no longer."""
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)

    def _copy(self, page: int) -> int:
        """A page of one's own in place of a shared one."""
        own = self._take()
        for x in (self.k, self.v):
            x[:, own].copy_(x[:, page])
        self._leave(page)
        return own

    def _on_device(self, numbers: list[int] | list[list[int]], shape: tuple[int, ...]) -> Tensor:
        """Numbers as int32; from pinned memory, so that a GPU's queue is not waited for."""
        x = torch.tensor(numbers, dtype=torch.int32, device="cpu").reshape(shape)
        return x.pin_memory().to(self.k.device, non_blocking=True) if self.k.is_cuda else x.to(self.k.device)
