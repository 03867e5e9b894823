"""The bench: its formula, its gate, what becomes of peers that fail, and a small run from command line to pictures."""

import json
import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases as shapes
from bench import check, measure, peers, plot, record, report, run
from bench.cases import Case
from bench.measure import Effort, Latency
from bench.peers import OURS, PEERS, STANDARD, Attention, Peer
from bench.record import Record, Row

CPU = torch.device("cpu")
TINY = Case("tiny", "made up", 2, 4, 2, 17, 37, 8, 24, True, "float32", "sweep")
FAST = run.Settings(CPU, threads=1, effort=Effort(0.0, 0.001, 3))
NAMES = ("cpu", "quick", "sweep", "models", "all", "auto", "features", "long", "speed")
SUITES = [(name, device) for name in NAMES for device in ("cpu", "cuda")]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The bench sets the number of threads; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def peer(name: str, function: Attention | Exception, absent: str | None = None) -> Peer:
    """A peer that computes function, or raises it when called."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        def attention(*operands: Tensor) -> Tensor:
            if isinstance(function, Exception):
                raise function
            return function(*operands)

        yield attention

    return Peer(name, "made up", lambda case, device: absent, prepare)


def right(case: Case) -> Attention:
    seen = peers.seen(case, CPU)
    hidden = None if seen is None else ~seen
    return lambda q, k, v: peers.standard_attention(q, k, v, hidden)


def measured(*measured_peers: Peer, case: Case = TINY, settings: run.Settings = FAST) -> Record:
    """A record of one case and some peers."""
    made = Record(record.machine(CPU, 1), run.described(run.parse([]), settings), {}, {}, {})
    run.time_all(made, [case], measured_peers, settings, lambda text: None, lambda case: None)
    record.compare_peers(made)
    return made


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 5), (3, 17), (17, 3), (1, 8), (8, 1)])
def test_flops_count_exactly_the_visible_pairs(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    case = replace(TINY, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
    offset = seqlen_k - seqlen_q
    visible = sum(not causal or j <= i + offset for i in range(seqlen_q) for j in range(seqlen_k))
    assert shapes.visible_pairs(case) == visible
    multiplied = case.batch * case.heads * visible * (case.head_dim + case.head_dim_v)
    assert shapes.flops(case, "forward") == 2 * multiplied
    assert shapes.flops(case, "backward") == 5 * multiplied
    assert shapes.flops(case, "both") == 7 * multiplied


def test_square_full_flops_are_the_fields_formula() -> None:
    case = next(c for c in shapes.standard_sweep() if c.name == "d128 full 4096")
    assert shapes.flops(case, "forward") == 4 * case.batch * 4096**2 * case.heads * 128


@pytest.mark.parametrize(("name", "device"), SUITES)
def test_every_case_of_a_suite_is_valid_and_names_its_source(name: str, device: str) -> None:
    suite = shapes.suite(name, torch.device(device))
    assert suite
    assert len({case.name for case in suite}) == len(suite)
    for case in suite:
        assert len(case.source) > 20
        assert case.heads % case.heads_k == 0
        assert case.dtype in ("float32", "bfloat16", "float16")
        assert case.series in ("sweep", "model", "feature", "long")
        assert (case.feature != "" or case.series == "feature") == (name in run.FEATURE_SUITES)
        assert not case.causal or case.seqlen_q <= case.seqlen_k  # standard attention has no rows without keys


def test_the_standard_sweep_holds_16k_tokens_and_hidden_size_2048() -> None:
    suite = shapes.standard_sweep()
    assert {(c.head_dim, c.causal) for c in suite} == {(d, causal) for d in (64, 128, 256) for causal in (False, True)}
    assert {c.seqlen_q for c in suite} == {512, 1024, 2048, 4096, 8192, 16384}
    assert all(c.batch * c.seqlen_q == 16384 and c.heads * c.head_dim == 2048 for c in suite)


def test_an_unknown_suite_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="suite must be one of .* got fast"):
        shapes.suite("fast", CPU)


def test_inputs_depend_on_the_seed_alone() -> None:
    assert all(map(torch.equal, shapes.inputs(TINY, CPU, 3), shapes.inputs(TINY, CPU, 3)))
    assert not torch.equal(shapes.inputs(TINY, CPU, 3)[0], shapes.inputs(TINY, CPU, 4)[0])


def test_the_oracle_in_pieces_is_the_oracle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, part = shapes.inputs(TINY, CPU, 0), check.Part(1, 1)
    whole = check.oracle(TINY, part, operands)
    monkeypatch.setattr(check, "SCORES_AT_ONCE", 5 * TINY.seqlen_k * TINY.group)
    for name, pieces in check.oracle(TINY, part, operands).items():
        torch.testing.assert_close(pieces, whole[name], rtol=1e-13, atol=1e-13, msg=name)


def test_standard_attention_and_ours_pass_the_gate_and_are_timed() -> None:
    made = measured(PEERS[STANDARD], PEERS[OURS])
    for row in made.rows.values():
        assert (row.outcome, row.reason) == ("ok", "")
        assert row.latency is not None and row.latency.samples >= 3
        assert row.latency.p20 <= row.latency.median <= row.latency.p80
        assert row.tflops == pytest.approx(shapes.flops(TINY, row.what) / row.latency.median / 1e9)
        assert set(row.errors) == ({"o"} if row.what == "forward" else {"o", "dq", "dk", "dv"})
        assert all(row.errors[name] <= row.bounds[name] for name in row.errors)
    assert made.checked == {"tiny": "every head"}


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return right(TINY)(q, k, v) * 1.0001


def poisoned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    nan = torch.zeros_like(v).index_fill(2, torch.tensor([0]), float("nan"))
    return right(TINY)(q, k, v + nan)


@pytest.mark.parametrize("function", [scaled, poisoned])
def test_a_wrong_peer_is_caught_and_not_timed(function: Attention) -> None:
    made = measured(PEERS[STANDARD], peer("crooked", function))
    for what in shapes.PASSES:
        row = made.rows["tiny", "crooked", what]
        assert row.outcome == "wrong" and row.latency is None and row.tflops is None
        assert "o " in row.reason
    assert "WRONG" in report.report(made)


def test_a_right_output_with_a_wrong_gradient_is_caught() -> None:
    def crooked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(TINY)(q, k, v) + 1e-3 * (k.sum() - k.sum().detach())

    made = measured(peer("crooked", crooked))
    assert made.rows["tiny", "crooked", "forward"].outcome == "ok"
    for what in ("backward", "both"):
        row = made.rows["tiny", "crooked", what]
        assert row.outcome == "wrong" and row.latency is None
        assert "dk" in row.reason and "dv" not in row.reason


def test_of_a_long_case_the_first_and_the_last_head_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def crooked_last_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factor = torch.ones(2, 4, 1, 1)
        factor[-1, -1] = 1.0001
        return right(TINY)(q, k, v) * factor

    monkeypatch.setitem(check.SCORES_CHECKED_WHOLE, "cpu", 1)
    made = measured(PEERS[STANDARD], peer("crooked", crooked_last_head))
    assert "first key head" in made.checked["tiny"]
    assert made.rows["tiny", STANDARD, "both"].outcome == "ok"
    assert made.rows["tiny", "crooked", "forward"].outcome == "wrong"
    assert made.checked["tiny"] in report.report(made)


def test_a_result_of_the_wrong_shape_is_an_error() -> None:
    made = measured(peer("crooked", lambda q, k, v: right(TINY)(q, k, v)[:, :, :-1]))
    assert made.rows["tiny", "crooked", "forward"].outcome == "error"
    assert "o must have shape" in made.rows["tiny", "crooked", "forward"].reason


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_out_of_memory_shows_as_oom_in_tables_and_pictures(error: Exception, tmp_path: Path) -> None:
    made = measured(PEERS[STANDARD], peer("flex", error))
    assert {made.rows["tiny", "flex", what].outcome for what in shapes.PASSES} == {"oom"}
    text = report.report(made)
    assert text.count("OOM") >= 3
    figure, panels = plot.figure(1, 1, 4, 3)
    plot.bars(panels[0][0], made, [TINY], plot.shown_peers(made, [TINY], "both"), "both")
    assert "OOM" in [text.get_text() for text in panels[0][0].texts]


def test_absent_peers_are_listed_with_the_reason() -> None:
    refusing = RuntimeError("No available kernel. Aborting execution.")
    gone = peer("flex", AssertionError("not to be called"), absent="flex is on holiday")
    made = measured(PEERS[STANDARD], gone, peer("sdpa-cudnn", refusing), PEERS["sdpa-efficient"])
    assert {made.rows["tiny", "flex", what].outcome for what in shapes.PASSES} == {"absent"}
    text = report.report(made)
    assert "flex: absent: flex is on holiday (every case)" in text
    assert "sdpa-cudnn: absent: this SDPA backend does not take the shape" in text
    assert "sdpa-efficient: absent: PyTorch has this backend for CUDA only; the device is cpu" in text


def test_every_peer_says_without_a_gpu_whether_it_is_there() -> None:
    for each in PEERS.values():
        reason = each.absent(TINY, CPU)
        assert reason is None or "cpu" in reason or "CPU" in reason
    for name in ("flash-attn-2", "flash-attn-3", "flash-attn-4"):
        reason = PEERS[name].absent(TINY, torch.device("cuda"))
        assert reason is None or reason.endswith("is not installed")


def test_another_error_of_a_peer_is_kept_and_does_not_stop_the_run() -> None:
    made = measured(peer("flex", TypeError("unexpected")), PEERS[STANDARD])
    assert made.rows["tiny", "flex", "both"].outcome == "error"
    assert made.rows["tiny", "flex", "both"].reason == "TypeError: unexpected"
    assert made.rows["tiny", STANDARD, "both"].outcome == "ok"


def test_after_the_time_limit_rows_say_skipped() -> None:
    made = measured(PEERS[STANDARD], settings=replace(FAST, deadline=0.0))
    assert {(row.outcome, row.reason) for row in made.rows.values()} == {("skipped", "the time limit was over")}


def test_a_peer_beyond_patience_is_checked_and_not_timed_but_standard_and_ours_are() -> None:
    hurried = replace(FAST, patience=0.0)
    made = measured(peer("flex", right(TINY)), peer("sdpa-math", scaled), PEERS[STANDARD], settings=hurried)
    assert made.rows["tiny", "flex", "both"].outcome == "skipped"
    assert made.rows["tiny", "sdpa-math", "both"].outcome == "wrong"
    assert made.rows["tiny", STANDARD, "both"].outcome == "ok"


def invented(medians: dict[str, float], case: Case = TINY) -> Record:
    """A record with given medians in milliseconds."""
    rows = [
        Row(case.name, name, what, "ok", latency=Latency(ms, 0.9 * ms, 1.2 * ms, 5), tflops=1 / ms)
        for name, ms in medians.items()
        for what in shapes.PASSES
    ]
    made = Record(record.machine(CPU, 1), run.described(run.parse([]), FAST), {case.name: case}, {}, {})
    made.add(rows)
    record.compare_peers(made)
    return made


def test_rows_where_ours_is_slower_are_kept_and_marked() -> None:
    made = invented({STANDARD: 4.0, OURS: 6.0, "sdpa-flash": 2.0})
    row = made.rows["tiny", OURS, "forward"]
    assert row.slower_than == [STANDARD, "sdpa-flash"]
    assert row.speedup == pytest.approx({"median": 4 / 6, "low": 3.6 / 7.2, "high": 4.8 / 5.4})
    text = report.report(made)
    assert "- tiny, forward: 200% slower than sdpa-flash" in text
    assert "6 ±15% 167 <" in text


def test_figures_that_are_missed_are_printed_as_missed() -> None:
    case = next(c for c in shapes.cpu() if c.name == "d64 full 4096")
    made = invented({STANDARD: 100.0, OURS: 50.0}, case)
    made.rows[case.name, STANDARD, "forward"].peak_bytes = 1_000_000_000
    made.rows[case.name, OURS, "forward"].peak_bytes = 2_000_000
    found = {figure.name: figure for figure in report.figures(made)}
    assert found["forward speed-up at 4096, full"].reached == pytest.approx(2.0)
    assert not found["forward speed-up at 4096, full"].met
    assert found["memory of standard over flash at 4096, forward"].met
    assert found["memory of standard over flash at 4096, forward + backward"].reached is None
    text = report.figure_lines(made)
    assert "MISSED" in text and "not measured" in text


def test_slope_of_a_power_law_is_its_exponent() -> None:
    for power in (0.0, 1.0, 2.0):
        assert report.slope([(n, 3 * n**power) for n in (256, 512, 4096)]) == pytest.approx(power)
    assert report.slope([(256, 0.0), (512, 1.0)]) is None


def test_a_peak_and_a_timing_of_the_same_pass_become_one_row() -> None:
    peak = Row("tiny", OURS, "both", reason="measured for memory alone", peak_bytes=7, peak_outcome="ok")
    timing = Row("tiny", OURS, "both", "ok", latency=Latency(1.0, 1.0, 1.0, 3))
    for order in ([peak, timing], [timing, peak]):
        made = invented({})
        made.add(order)
        row = made.rows["tiny", OURS, "both"]
        assert (row.outcome, row.reason, row.peak_bytes, row.peak_outcome) == ("ok", "", 7, "ok")


def test_a_fresh_process_weighs_the_scores_and_not_its_imports() -> None:
    case = replace(TINY, batch=1, heads=2, heads_k=2, seqlen_q=1024, seqlen_k=1024, causal=False, head_dim_v=8)
    peak = measure.cpu_peak_in_child(case, STANDARD, "forward", threads=1, seed=0)
    # The scores and the weights; imports alone would be thirty times that.
    assert 1.9 < peak / shapes.score_bytes(case) < 3.5


@pytest.mark.parametrize(
    ("status", "stderr"), [(-9, ""), (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory")]
)
def test_a_child_that_ran_out_of_memory_is_oom(status: int, stderr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], status, "", stderr)
    monkeypatch.setattr(measure.subprocess, "run", lambda *args, **kwargs: ended)
    assert run.weigh_in_child(TINY, OURS, "both", FAST).peak_outcome == "oom"


def test_standard_attention_that_would_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def available(count: int) -> Callable[[], int]:
        return lambda: count

    case = replace(TINY, seqlen_q=2**17, seqlen_k=2**17)
    monkeypatch.setattr(measure, "available_memory", available(2**33))
    row = run.weigh_in_child(case, STANDARD, "forward", FAST)
    assert row.peak_outcome == "oom" and "not started: it needs 1099.5 GB" in row.peak_reason
    monkeypatch.setattr(measure, "available_memory", available(2**50))
    assert run.weigh_in_child(case, STANDARD, "forward", FAST).peak_outcome == "skipped"


def test_a_small_run_writes_json_and_pictures_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    arguments = [
        "--quick",
        "--device",
        "cpu",
        "--cases",
        "128",
        "ViT",
        "--no-memory",
        "--out",
        str(tmp_path),
        "--threads",
        "1",
    ]
    assert run.main([*arguments, "--peers", STANDARD, OURS]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"machine", "settings", "cases", "checked", "rows"}
    assert {"cpu", "cores", "threads", "cpu_clock", "date", "versions"} <= set(content["machine"])
    assert {"seed", "effort", "timer", "statistics", "memory"} <= set(content["settings"])
    assert {"python", "torch", "triton"} <= set(content["machine"]["versions"])
    assert {row["outcome"] for row in content["rows"]} == {"ok"}
    assert {tuple(sorted(row["latency"])) for row in content["rows"]} == {("median", "p20", "p80", "samples")}
    assert len(content["rows"]) == 3 * 2 * 3  # cases, peers, passes
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out

    pictures = {"speedup.png", *(f"throughput-{what}.png" for what in shapes.PASSES)}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")

    assert run.main([*arguments, "--peers", "sdpa-math", "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert len(again["rows"]) == 3 * 3 * 3
    kept = [row["latency"] for row in again["rows"] if row["peer"] == OURS]
    assert kept == [row["latency"] for row in content["rows"] if row["peer"] == OURS]


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    made = invented({STANDARD: 4.0, OURS: math.pi})
    made.save(tmp_path / "results.json")
    assert record.load(tmp_path / "results.json") == made


def test_memory_curves_are_drawn_with_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    made = invented({})
    for case in shapes.memory(CPU):
        made.cases[case.name] = case
        for what in ("forward", "both"):
            made.add([Row(case.name, OURS, what, peak_bytes=100 * case.seqlen_k, peak_outcome="ok")])
            long = case.seqlen_k > 4096
            theirs = Row(case.name, STANDARD, what, peak_bytes=None if long else case.seqlen_k**2)
            made.add([replace(theirs, peak_outcome="oom" if long else "ok")])
    assert plot.draw_memory(made, tmp_path / "memory.png") is not None
    text = report.shares(made, report.memory_curves(made)[0], "forward")
    assert "OOM" in text and "41x" in text
    slopes = {figure.name: figure.reached for figure in report.figures(made)}
    assert slopes["slope of flash's memory, forward"] == pytest.approx(1.0)
