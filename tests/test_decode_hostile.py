"""Lengths, slots and tables that lie: nothing is read out of bounds, and only who lies is not a number."""

import pytest
import torch

from tests import decoding
from tests.bounds import Outputs
from tests.calls import Place
from tests.decoding import Call, check, equal, random_call, run

pytestmark = pytest.mark.interpret


class Hostile:
    """Small calls of which some sequence lies about its length, slot, padding or pages."""

    LIES = (-1, -(2**31), 2**31 - 1, 10**6, 2**30)

    def __init__(self, place: Place, page_size: int | None) -> None:
        self.page_size = page_size
        pads, slots = torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])
        self.call = random_call(
            place, (9, 12, 5), heads=2, heads_k=1, seqlen_q=2, capacity=12, page_size=page_size,
            cache_leftpad=pads.to(torch.int32), cache_batch_idx=slots.to(torch.int32),
        )  # fmt: skip
        if page_size is not None:  # all of the table is pages, so that only what is drawn lies
            table = self.call.options["block_table"]
            pages = torch.randint(len(self.call.k_cache), table.shape, dtype=torch.int32, device=table.device)
            self.call.options["block_table"] = pages
        for t in (self.call.k_cache, self.call.v_cache):
            t.copy_(torch.randn(t.shape))

    def drawn(self, generator: torch.Generator) -> Call:
        """The call with one to three of its numbers replaced."""
        limits = {"cache_seqlens": 12, "cache_batch_idx": 3, "cache_leftpad": 13, "block_table": len(self.call.k_cache)}
        options = {name: y.clone() for name, y in self.call.options.items()}
        names = [name for name in limits if name in options]

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        for _ in range(1 + draw(3)):
            name = names[draw(len(names))]
            pool = (*self.LIES, limits[name], limits[name] + 1, 0, 1, limits[name] - 1)
            flat = options[name].view(-1)
            flat[draw(flat.numel())] = pool[draw(len(pool))]
        return self.call._replace(options=options, new=draw(2))

    def hold(self, seed: int, splits: int) -> int:
        """Run a drawn call; how many of its sequences are bad."""
        x = self.drawn(torch.Generator().manual_seed(seed))
        got, want = run(x, splits), decoding.oracle(x)
        bad = want.lse.isnan().all(-1).all(-1)
        assert got.o[bad].isnan().all() and got.lse[bad].isnan().all()
        for b in (~bad).nonzero().flatten().tolist():
            options = {name: y if name == "block_table" else y[b : b + 1] for name, y in x.options.items()}
            alone = run(x._replace(q=x.q[b : b + 1], options=options), splits)
            assert equal(alone, Outputs(got.o[b : b + 1], got.lse[b : b + 1])), "a good sequence changed"
            assert torch.allclose(got.o[b].double(), want.o[b], atol=1e-5)
        return int(bad.sum())


@pytest.mark.parametrize("page_size", [None, 3])
def test_limits_are_kept_to_the_number(place: Place, page_size: int | None) -> None:
    """The largest number that is right, and the next."""
    hostile = Hostile(place, page_size)
    x = hostile.call
    limits = {"cache_seqlens": 12, "cache_batch_idx": 2, "cache_leftpad": 12, "block_table": len(x.k_cache) - 1}
    want = run(x)
    for name, limit in limits.items():
        if name in x.options:
            for value, lies in ((limit, False), (0, False), (limit + 1, True), (-1, True)):
                options = {key: y.clone() for key, y in x.options.items()}
                options[name][1] = value  # of the sequence of 12 keys, whose slot is 0
                if name == "block_table":
                    options[name][1] = x.options[name][1]
                    options[name][0, 1] = value
                changed = x._replace(options=options)
                got = run(changed)
                assert bool(got.lse[1].isnan().all()) == bool(got.o[1].isnan().all()) == lies, (name, value)
                if not lies:
                    check(got, changed)
                for b in (0, 2):
                    assert torch.equal(got.o[b], want.o[b]) and torch.equal(got.lse[b], want.lse[b]), (name, value)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("page_size", [None, 1, 3, 16])
@pytest.mark.parametrize("splits", [1, 3])
def test_hostile_lengths_and_tables_harm_their_own_sequence_only(
    place: Place, page_size: int | None, splits: int
) -> None:
    hostile = Hostile(place, page_size)
    assert sum(hostile.hold(seed, splits) for seed in range(6)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [None, 1, 3, 16])
def test_a_thousand_hostile_lengths_and_tables(place: Place, page_size: int | None) -> None:
    hostile = Hostile(place, page_size)
    assert sum(hostile.hold(1000 + seed, 1 + seed % 3) for seed in range(250)) > 100


@pytest.mark.sampled(4)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("position", [0, 20, 45, 60])
def test_all_tiles_of_rows_find_a_lie(place: Place, position: int, splits: int) -> None:
    """A page that is none spoils rows that see nothing of it, too: those of the tile before it."""
    x = random_call(place, (61, 40), heads=2, heads_k=1, seqlen_q=40, page_size=3)
    clean = run(x, splits)
    x.options["block_table"][0, position // 3] = -1
    got = run(x, splits)
    assert got.o[0].isnan().all() and got.lse[0].isnan().all()
    assert torch.equal(got.o[1], clean.o[1]) and torch.equal(got.lse[1], clean.lse[1])


def test_a_lie_that_nobody_sees_harms_nobody(place: Place) -> None:
    """Pages before the window or under the padding, and past the end, may be given back."""
    for options in ({"window": 20}, {"cache_leftpad": torch.tensor([30, 20], dtype=torch.int32)}):
        x = random_call(place, (61, 40), seqlen_q=2, page_size=3, capacity=90, **options)
        table = x.options["block_table"]
        first = [61 - 2 - 20, 40 - 2 - 20] if "window" in options else [30, 20]
        for b in range(2):
            table[b, : first[b] // 3] = -1
            table[b, -(-(61, 40)[b] // 3) :] = 2**31 - 1
        check(run(x, 2), x)
        table[0, first[0] // 3] = -1
        got = run(x, 2)
        assert got.o[0].isnan().all() and got.o[1].isfinite().all()
