"""The scale suite: what the model counts is what the code does, its two crossovers agree, and ranks are measured."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record, run, scale_memory, scale_plot, scale_ranks, scale_report, scale_suite
from bench.scale import (
    Device,
    Job,
    Link,
    Message,
    Point,
    Step,
    block_of,
    call_of,
    crossover,
    efficiency,
    found_crossover,
    hidden,
    predicted,
    steps_of,
    taken,
    transfer,
)
from bench.scale_memory import STANDARD, tokens_that_fit
from flash import ring_methods, ulysses
from flash.kernels.spec import Gradients
from flash.links import Links, Post
from flash.ring_methods import Output
from flash.shards import Band, Piece, lengths_of

SMALL: dict[str, Any] = {"heads": 4, "heads_k": 2, "head_dim": 8, "itemsize": 4}
FAST = Device("made up", (Point(1, 1, False, 1e12, 5e11),), 1e12, ((1, 1e12),))
WIRE = Link("made up", 1e9, 1e-5)
WHAT = pytest.mark.parametrize("what", ["forward", "backward"])
METHODS = pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
LAYOUTS = pytest.mark.parametrize(
    ("sharding", "causal"), [("contiguous", False), ("contiguous", True), ("zigzag", True)]
)


@pytest.mark.parametrize(
    "band", [Band(0, None, None), Band(3, None, 0), Band(-5, None, 0), Band(2, 4, 1), Band(0, 0, 0)]
)
def test_pairs_are_those_that_counting_finds(band: Band) -> None:
    for start in range(0, 20, 3):
        for rows, first, n in ((5, 7, 6), (1, 0, 9), (8, 8, 8), (3, 2, 1)):
            queries, keys = Piece(start, slice(0, rows)), Piece(first, slice(4, 4 + n))
            block = block_of(Job(1, 1), (1, 1), queries, keys, band)
            left, right = (float("inf") if x is None else x for x in (band.left, band.right))
            seen = [
                [-left <= j - (i + band.offset) <= right for j in range(first, first + n)]
                for i in range(start, start + rows)
            ]
            assert block.pairs == sum(map(sum, seen))
            assert 0 <= block.shared <= sum(all(column) for column in zip(*seen, strict=True))


@LAYOUTS
@METHODS
def test_ranks_together_do_all_pairs_of_the_whole_once(method: str, sharding: str, causal: bool) -> None:
    job = Job(4, 64, method, sharding, causal, **SMALL)
    counted = sum(b.heads * b.pairs for step in steps_of(job, "forward") for own in step.blocks for b in own)
    assert counted == job.heads * (64 * 65 // 2 if causal else 64 * 64)


class Silent(Links):
    """Links of one rank of many that are not there: what it would send is written down, and nothing comes."""

    sent: list[list[Message]] = []

    def post(self, sends: Any, receives: Any) -> Post:
        sizes = [Message(self.rank, peer, x.numel() * x.element_size()) for peer, x in sends if peer != self.rank]
        Silent.sent.append([message for message in sizes if message.nbytes])
        for _, x in receives:
            x.zero_()
        return Post([], [])


def really_sent(job: Job, what: str, rank: int) -> list[Message]:
    """What the code posts on one rank, in order."""
    rows, keys = (lengths_of(n, job.world_size, job.sharding) for n in (job.rows, job.keys))
    q, do = (torch.randn(1, job.heads, rows[rank], job.head_dim) for _ in "qo")
    k, v = (torch.randn(1, job.heads_k, keys[rank], job.head_dim) for _ in "kv")
    call, layout = call_of(job)
    call, links = call._replace(q=q, k=k, v=v), Silent(None, rank, job.world_size)
    Silent.sent = []
    output = Output(q, torch.zeros(q.shape[:3]), do, None)
    if what == "forward":
        if job.method == "ulysses":
            ulysses.forward(links, call, layout)
        else:
            ring_methods.forward(job.method, links, call, layout)
    elif job.method == "ulysses":
        ulysses.backward(links, call, layout, output, Gradients(True, True, True, False, False, False))
    else:
        needs = Gradients(True, True, True, False, False, False)
        ring_methods.backward(job.method, links, call, layout, output, needs)
    return [message for posted in Silent.sent for message in posted]


@WHAT
@LAYOUTS
@METHODS
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_messages_are_those_that_the_code_posts(
    method: str, sharding: str, causal: bool, what: str, world_size: int
) -> None:
    job = Job(world_size, 52 if method == "ring" else 48, method, sharding, causal, **SMALL)
    steps = steps_of(job, what)
    for rank in range(world_size):
        counted = [m for step in steps for m in step.messages if m.source == rank and m.nbytes]
        assert sorted(counted) == sorted(really_sent(job, what, rank))


def test_a_hop_is_two_tensors_of_the_shard_forward_and_their_float32_gradients_behind_it() -> None:
    job = Job(4, 4096, **{**SMALL, "itemsize": 2})
    numbers = 2 * 2 * 1024 * 8
    forward = [{m.nbytes for m in step.messages} for step in steps_of(replace(job, causal=False), "forward")]
    assert forward == [{2 * numbers}] * 3 + [set()]
    backward = [{m.nbytes for m in step.messages} for step in steps_of(replace(job, causal=False), "backward")]
    assert backward == [{2 * numbers}, {2 * numbers}, {2 * numbers, 4 * numbers}, {4 * numbers}, {4 * numbers}]


def test_a_step_takes_as_long_as_the_slower_of_its_products_and_its_transfer() -> None:
    messages = [Message(0, 1, 1000), Message(0, 2, 3000), Message(1, 2, 500)]
    step = Step([[], [], []], [0, 0, 0], [0, 0, 0], messages)
    assert transfer(step, WIRE) == pytest.approx(1e-5 + 4000 / 1e9)
    assert transfer(step._replace(messages=[]), WIRE) == 0.0
    assert taken([1e-6, 2e-6, 0.0], step, FAST, WIRE) == transfer(step, WIRE)
    assert taken([1.0, 3.0, 0.0], step, FAST, WIRE) == 3.0
    job = Job(4, 2**16, causal=False)
    slow, fast = (predicted(job, "forward", FAST, Link("", width, 0.0)) for width in (1e6, 1e15))
    hops = 3 * 2 * 8 * 128 * 2**14 * 2 / 1e6
    assert slow == pytest.approx(hops + fast / 4, rel=1e-3)
    dear = FAST._replace(calls=((("ring", "forward"), 7.0), (("ulysses", "forward"), 9.0)))
    assert predicted(job, "both", dear, WIRE) == pytest.approx(predicted(job, "both", FAST, WIRE) + 7.0)


def test_ranks_that_share_processors_leave_them_to_each_other_and_to_messages() -> None:
    quiet = Step([[]] * 4, [0] * 4, [0] * 4, [])
    two = FAST._replace(cores=2)
    assert taken([1.0] * 4, quiet, two, WIRE) == 1.0  # seconds are those of all being busy
    assert taken([0.0, 0.0, 0.0, 1.0], quiet, two, WIRE) == 0.5  # one has a processor for itself
    assert taken([0.0, 1.0, 1.0, 1.0], quiet, two, WIRE) == 0.75  # three have two
    messages = quiet._replace(messages=[Message(n, (n + 1) % 4, 10**9) for n in range(4)])
    dear = Link("carried by those who compute", 1e9, 0.0, work=0.5)
    assert (
        taken([1.0] * 4, messages, two, dear) == 2.0 and taken([1.0] * 4, messages, two, dear._replace(work=0.0)) == 1.0
    )


@pytest.mark.parametrize("link", [*scale_report.LINKS, WIRE, Link("no latency", 1e10, 0.0)])
@WHAT
@LAYOUTS
def test_the_crossover_by_formula_is_the_one_that_the_steps_have(
    sharding: str, causal: bool, what: str, link: Link
) -> None:
    job = Job(8, 0, "ring", sharding, causal)
    formula, found = crossover(job, what, FAST, link), found_crossover(job, what, FAST, link)
    assert found is not None and formula <= found < formula + 3
    assert hidden(replace(job, keys=8 * found), what, FAST, link)
    assert not hidden(replace(job, keys=8 * (found - 2)), what, FAST, link)


def test_a_ring_that_nothing_hides_has_no_crossover() -> None:
    assert found_crossover(Job(8, 0), "forward", FAST, Link("", 1.0, 0.0)) is None


def test_efficiency_is_half_where_causal_rows_are_contiguous_and_whole_in_a_zigzag() -> None:
    wide = Link("", 1e15, 0.0)
    found = {s: efficiency(Job(8, 2**19, "ring", s), "both", FAST, wide) for s in ("contiguous", "zigzag")}
    assert found["contiguous"] == pytest.approx(8 / 15, rel=0.02) and found["zigzag"] == pytest.approx(1.0, rel=0.02)


def test_tokens_that_fit_grow_with_devices_as_each_method_says() -> None:
    fits = {
        method: [tokens_that_fit(Job(n, 0, method, "zigzag"), 4e10, 32) or 0 for n in (4, 8, 16, 32)]
        for method in scale_report.METHODS
    }
    growth = {method: [b / a for a, b in zip(x, x[1:], strict=False)] for method, x in fits.items()}
    assert growth["ring"] == pytest.approx([2.0, 2.0, 2.0], rel=1e-3)
    assert growth["ulysses"][0] == pytest.approx(2.0, rel=1e-3)
    assert growth[STANDARD] == pytest.approx([2**0.5] * 3, rel=0.03)
    assert growth["all_gather"][0] > growth["all_gather"][1] > growth["all_gather"][2]
    assert tokens_that_fit(Job(64, 0, "ulysses"), 4e10, 32) is None  # 32 heads
    limit = fits["ring"][0]
    assert scale_memory.resident(Job(4, limit, "ring", "zigzag"), 32) <= 4e10
    assert scale_memory.resident(Job(4, limit + 8, "ring", "zigzag"), 32) > 4e10


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_buffers_of_a_ring_are_no_more_than_the_code_holds(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(world_size, 16 * world_size, causal=False, **SMALL)
    own = 2 * 2 * 16 * 8 * 4
    assert scale_memory.worst(job, "forward")["keys here and coming"] == own * min(world_size - 1, 2)
    assert scale_memory.worst(job, "forward")["own keys, packed"] == own
    expected = {2: 1, 3: 3, 5: 3}[world_size] * own
    assert scale_memory.worst(job, "backward")["gradients here, leaving and coming"] == expected


def invented() -> dict[str, Any]:
    """A run of one and two ranks, as it is written down, of which the model misses one row."""
    point = {"heads": 4, "rows": 32, "keys": 32, "forward": 1e10, "backward": 1e10}
    took = {"median": 0.002, "p20": 0.0018, "p80": 0.0022, "samples": 5}
    long = took | {"median": 9.0, "p80": 9.5}
    points = [point | {"causal": causal, "forward_s": took} for causal in (False, True)]
    links = [{"bytes": size, **took, "median": 1e-4 + size / 1e9, "work": 0.5} for size in (4096, 2**20)]
    worlds = {}
    for n in (1, 2):
        jobs = [
            {
                "job": asdict(job),
                "error_of_bound": {"o": 0.1},
                "forward": dict(took),
                "both": long,
            }
            for job in (Job(n, 64, causal=True, **SMALL), Job(n, 64, causal=False, **SMALL))
        ]
        rates = {"merging": 1e9, "packing": [[4096, 1e9]], "calls": [jobs[0] | {"both": took}]}
        worlds[str(n)] = {"seconds": 1.0, "points": points, "links": links[: 2 * (n > 1)], "jobs": jobs, **rates}
    peaks = [{"job": asdict(Job(2, 64, **SMALL)), "what": "both", "peak": 10**6}]
    machine = record.machine(torch.device("cpu"), 1)
    load, settings = {"before": 0.5}, {"seed": 0, "rounds": 3, "threads_of_a_rank": 1}
    return {"machine": machine, "settings": settings, "worlds": worlds, "peaks": peaks, "load_average": load}


def test_the_report_says_what_is_simulated_and_which_rows_the_model_misses(tmp_path: Path) -> None:
    text = scale_report.write(invented(), tmp_path)
    assert "assumed, not measured: no kernel here has run on a GPU" in text and "nominal" in text
    assert "Further off than 1.5x" in text and "causal on 2, both" in text
    content = json.loads((tmp_path / "scale.json").read_text())
    row = content["worlds"]["2"]["jobs"][0]["both"]
    assert row["ratio"] == pytest.approx(9.0 / row["predicted"]) and row["efficiency"] == pytest.approx(0.5)
    link = content["worlds"]["2"]["link"]
    assert link["bandwidth"] == pytest.approx(1e9) and link["latency"] == pytest.approx(1e-4 + 4096 / 1e9)
    assert (tmp_path / "scale.md").read_text() == text


def test_pictures_are_drawn_and_those_of_gpus_say_that_they_are_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    from matplotlib.figure import Figure

    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **style: titles.append(text))
    content = invented()
    scale_report.finish(content)
    pictures = scale_plot.draw(content, tmp_path)
    assert [path.name for path in pictures] == ["scale-check.png", "scale-crossover.png", "scale-tokens.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert ["Simulated, not measured" in title for title in titles] == [False, True, True]


@pytest.mark.slow
def test_two_ranks_are_checked_timed_and_weighed(tmp_path: Path) -> None:
    job = Job(2, 64, "ring", "zigzag", True, **SMALL)
    found = scale_ranks.times_of([job], 1, 0)
    (row,) = found["jobs"]
    assert row["forward"]["median"] > 0 and row["both"]["median"] > row["forward"]["median"] / 2
    assert set(row["error_of_bound"]) == {"o", "dq", "dk", "dv"} and max(row["error_of_bound"].values()) <= 1
    assert [link["bytes"] for link in found["links"]] == list(scale_ranks.SIZES)
    assert all(point["forward"] > 0 for point in found["points"]) and found["merging"] > 0
    assert all(rate > 0 for _, rate in found["packing"])


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_of_them_and_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"rank \d of 2: .*KeyError"):
        scale_ranks.ranks({"kind": "nonsense"}, 2)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        def of(self, job: Job) -> tuple[list[torch.Tensor], torch.Tensor]:
            return [torch.zeros(1, 4, 8, 8)] * 4, torch.full((4,), 1e-3)

    monkeypatch.setattr(scale_ranks, "shard", lambda x, sharding: x)
    wrong = lambda: (torch.full((1, 4, 8, 8), 2e-3),) * 4  # noqa: E731
    with pytest.raises(RuntimeError, match="o is off by 0.002"):
        scale_ranks.checked(Job(1, 8, **SMALL), wrong, Told())  # type: ignore[arg-type]


def test_the_suite_is_one_of_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(scale_suite, "main", lambda argv: called.append(argv) or 0)
    assert run.main(["--suite", "scale", "--quick", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert called == [["--out", str(tmp_path), "--seed", "3", "--quick"]]
