"""The speed suite: its cases in order, peers in processes of their own, the ceiling, the race as text and pictures."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import apart, ceiling, check, measure, overlap, race, race_plot, record, run, trial
from bench import cases as shapes
from bench.apart import STOPPED, Apart
from bench.cases import Case
from bench.measure import Effort, Latency
from bench.peers import FLEX, HOPPER, OURS, PEERS, PLAIN, TUTORIAL
from bench.record import Record, Row
from tests.test_bench import measured, peer, right

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Case("small", "made up", 2, 4, 2, 33, 33, 8, 8, True, "float32", "sweep")
FAST = trial.Settings(CPU, threads=1, effort=Effort(0.0, 0.001, 3), memory=False, few=True)


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_matters_most_comes_first_and_everything_comes_once() -> None:
    suite = shapes.suite("speed", GPU)
    assert [case.name for case in suite[:4]] == [
        "d128 full 8192",
        "d128 causal 8192",
        "d128 full 4096",
        "d128 causal 4096",
    ]
    sweep = {(c.head_dim, c.causal, c.seqlen_q) for c in suite if c.series == "sweep"}
    lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    assert sweep == {(d, causal, n) for d in (64, 128, 256) for causal in (False, True) for n in lengths}
    assert all(c.batch * c.seqlen_q == max(16384, c.seqlen_q) for c in suite if c.series == "sweep")
    grouped = [c for c in suite if c.series == "model"]
    assert {(c.heads, c.heads_k, c.head_dim) for c in grouped} == {(32, 8, 128)}
    assert "Llama-3-8B" in {c.name for c in grouped}
    wanted = {case for case, _, _ in race.TARGETS} | set(race.LEAD_CASES)
    assert wanted <= {case.name for case in suite[:10]}, "the figures to reach are measured before time runs out"
    assert {c.dtype for c in shapes.suite("speed", GPU, "float16")} == {"float16"}


def test_other_suites_do_not_time_what_only_the_race_is_about() -> None:
    assert {PLAIN, HOPPER, TUTORIAL} <= set(run.suited("speed"))
    for suite in ("auto", "sweep", "features"):
        assert not {PLAIN, HOPPER, TUTORIAL} & set(run.suited(suite))


def test_a_race_in_another_dtype_does_not_overwrite_the_first() -> None:
    assert run.files_of("speed", "bfloat16", GPU) == run.files_of("speed", "float16", CPU) == ("speed", "speed.md")
    assert run.files_of("speed", "float16", GPU) == ("speed-float16", "speed-float16.md")
    assert run.files_of("sweep", "float16", GPU) == ("results", "report.md")
    assert run.files_of("long", "float16", GPU) == ("long", "long.md")


@pytest.mark.parametrize("where", ["a middle head of o", "a middle head of dq", "one NaN of dk"])
def test_heads_that_are_not_compared_whole_are_still_looked_at(where: str) -> None:
    case = replace(SMALL, heads=6, heads_k=6)
    tensors = shapes.inputs(case, CPU, 0)
    expected = check.expect(case, *tensors, few=True)
    assert "first key head" in expected.extent and "queries of every head" in expected.extent
    q, k, v, do = tensors
    o = right(case)(q, k, v)
    results = dict(zip(check.NAMES, (o.detach(), *torch.autograd.grad(o, (q, k, v), do)), strict=True))
    assert check.compare(case, expected, results).ok
    name = where.split()[-1]
    wrong = results[name].clone()
    wrong[0, 3, 5] = float("nan") if "NaN" in where else wrong[0, 3, 5]
    wrong[0, 3] *= 1.01
    verdict = check.compare(case, expected, results | {name: wrong})
    assert not verdict.ok and not verdict.errors[name] <= verdict.bounds[name]


def test_the_sample_is_the_oracle_at_its_rows() -> None:
    tensors = shapes.inputs(SMALL, CPU, 0)
    found = check.sampled(SMALL, tensors)
    every = [check.oracle(SMALL, check.Part(b, h), tensors) for b in range(2) for h in range(2)]
    for name in ("o", "dq"):
        whole = torch.cat([part[name] for part in every]).view(2, 4, 33, 8)
        torch.testing.assert_close(found.expected[name], whole[:, :, found.rows], rtol=1e-13, atol=1e-13)
    assert found.rows[0] == 0 and found.rows[-1] == 32


def test_backends_that_flash_refuses_are_absent_with_its_reason() -> None:
    case = replace(SMALL, head_dim=64, head_dim_v=64)
    reason = PEERS[HOPPER].absent(case, CPU)
    assert reason is not None and reason.startswith("backend 'hopper' does not serve this forward")
    assert "use backend" not in reason
    made = measured(PEERS[HOPPER], PEERS[TUTORIAL], case=case, settings=FAST)
    assert {row.outcome for row in made.rows.values()} == {"absent"}
    refused = NotImplementedError("backend 'hopper' has no backward for head_dim 256; use backend='auto'")
    made = measured(peer(HOPPER, refused), case=case, settings=FAST)
    assert {(row.outcome, row.reason) for row in made.rows.values()} == {
        ("absent", "backend 'hopper' has no backward for head_dim 256")
    }


def stand_in(job: dict[str, Any]) -> dict[str, Any]:
    """What a child runs in place of bench.apart.serve: a peer whose backward never comes back, and one that dies."""
    if job["peer"] == "hangs" and "backward" in job["passes"]:
        time.sleep(600)
    if job["peer"] == "dies" and "forward" in job["passes"]:
        raise SystemExit(3)
    took = Latency(1.0, 0.9, 1.1, 5)
    rows = [Row(job["case"].name, job["peer"], what, "ok", latency=took, tflops=1.0) for what in job["passes"]]
    return {"status": "ok", "rows": rows, "note": ""}


def outcomes(rows: list[Row]) -> dict[str, str]:
    return {row.what: row.outcome for row in rows}


@pytest.fixture
def expected() -> Any:
    tensors = shapes.inputs(SMALL, CPU, 0)
    return tensors, check.expect(SMALL, *tensors, few=True)


def test_a_peer_in_a_process_of_its_own_is_checked_and_timed(expected: Any, tmp_path: Path) -> None:
    children = Apart(tmp_path, patience=120.0)
    try:
        children.begin([OURS])
        for settings in (FAST, replace(FAST, deadline=0.0)):
            rows = children.measure(SMALL, PEERS[OURS], *expected, settings)
            late = settings.deadline == 0.0
            assert outcomes(rows) == dict.fromkeys(shapes.PASSES, "skipped" if late else "ok")
            assert all((row.latency is None) == late for row in rows)
        assert set(rows[0].errors) == set() and (tmp_path / "expected.pt").exists()
        wrong = replace(
            expected[1], slices=[replace(s, bounds=dict.fromkeys(s.bounds, 0.0)) for s in expected[1].slices]
        )
        assert outcomes(children.measure(SMALL, PEERS[OURS], expected[0], wrong, FAST))["both"] == "wrong"
    finally:
        children.close()


@pytest.mark.slow
def test_a_peer_that_hangs_or_dies_is_recorded_and_passed_over(
    expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "CHANCES", 1)  # a process takes seconds to start
    children = Apart(tmp_path, patience=1.0, runner="tests.test_bench_speed:stand_in")
    try:
        first, second = (children.measure(SMALL, peer("hangs", right(SMALL)), *expected, FAST) for _ in range(2))
        assert outcomes(first) == {"forward": "ok", "backward": "error", "both": "error"}
        assert first[-1].reason == f"{STOPPED}more than 1 s"
        assert outcomes(second) == {"forward": "ok", "backward": "skipped", "both": "skipped"}
        assert "passed over: it had to be stopped" in second[-1].reason
        children.patience = 60.0  # to die takes no time, but a process takes its time on a busy machine
        rows = children.measure(SMALL, peer("dies", right(SMALL)), *expected, FAST)
        assert outcomes(rows) == dict.fromkeys(shapes.PASSES, "error")
        assert rows[0].reason == f"{STOPPED}the process ended with 3"
        assert rows[-1].reason == "not tried: its forward had to be stopped"
        stopped = {key for key, stops in children.stops.items() if stops}
        assert stopped == {("hangs", "backward"), ("dies", "forward")}
    finally:
        children.close()


def test_a_job_that_the_time_limit_ends_is_left_for_the_next_call(tmp_path: Path) -> None:
    children, blank = Apart(tmp_path, patience=90.0), [Row("small", FLEX, "forward")]
    ended = {"status": "timeout", "note": "more than 12 s"}
    assert children.judged(blank, ended, cut_short=True)[0].outcome == "skipped"
    assert not children.stops
    assert children.judged(blank, ended, cut_short=False)[0].outcome == "error"
    assert children.judged(blank, {"status": "oom", "note": "8 GiB"}, cut_short=False)[0].outcome == "oom"


def test_what_an_earlier_run_had_to_stop_is_not_tried_again(expected: Any, tmp_path: Path) -> None:
    earlier = Record({}, {}, {}, {}, {})
    earlier.add([Row(f"case {n}", HOPPER, what, "error", f"{STOPPED}hung") for n in range(2) for what in shapes.PASSES])
    children = Apart(tmp_path, patience=1.0, runner="no.such:module")
    children.recall(earlier)
    rows = children.measure(SMALL, peer(HOPPER, right(SMALL)), *expected, FAST)
    assert outcomes(rows) == dict.fromkeys(shapes.PASSES, "skipped")


def test_after_a_fault_on_the_gpu_the_process_is_not_kept(
    expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setitem(PEERS, "faulty", peer("faulty", fault))
    path = Apart(tmp_path, 1.0).write(expected[1])
    job = {"case": SMALL, "peer": "faulty", "passes": ["forward"], "expected": str(path), "settings": FAST}
    outcome = apart.serve(job)
    assert outcome["status"] == "crash"
    assert outcome["rows"][0].outcome == "error" and "illegal memory access" in outcome["rows"][0].reason
    assert apart.serve(job | {"peer": OURS})["status"] == "ok"


def test_the_ceiling_is_the_best_median_of_a_product() -> None:
    found = ceiling.ceiling(CPU, "float32", sizes=(64, 96))
    assert found["tflops"] == max(rate["tflops"] for rate in found["sizes"].values()) > 0
    for rate in found["sizes"].values():
        assert rate["low"] <= rate["tflops"] <= rate["high"]
    assert found["clocks"] == {"absent": "the device is cpu"}


def test_a_gpu_call_that_outlasts_the_time_has_its_samples_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton exists for Linux alone")
    asked: list[float] = []

    def do_bench(call: Any, warmup: float, rep: float, return_mode: str) -> list[float]:
        asked.append(rep)
        return [80.0] * max(1, int(rep / 80.0))

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert measure.latency(lambda: None, GPU, run.GPU_EFFORT).samples >= run.GPU_EFFORT.samples
    assert asked[0] == 100.0 and len(asked) == 2


def test_clocks_are_read_by_name_or_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ceiling.answer("1980 MHz, 3201 MHz, 612.33 W, 54\n345 MHz, 3201 MHz, 70.00 W, 30\n") == {
        "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "power.draw": "612.33 W", "temperature.gpu": "54"
    }  # fmt: skip
    assert "No devices" in ceiling.answer("No devices were found\n")["absent"]
    monkeypatch.setattr(ceiling, "question", lambda: ["no-such-program-here"])
    assert "no-such-program-here" in ceiling.clocks(GPU)["absent"]
    assert "no-such-program-here" in ceiling.clocks_under(lambda: None, GPU)["absent"]


def made_up(lengths: tuple[int, ...] = ()) -> Record:
    """A race that no GPU ran: every kind of outcome, at round rates; of all lengths or of these."""
    settings = trial.Settings(GPU, effort=run.GPU_EFFORT)
    machine = record.machine(CPU, 1) | {"device": "cuda", "gpu": "made-up GPU", "gpu_clocks": "not readable"}
    made = Record(machine, run.described(run.parse(["--suite", "speed"]), settings), {}, {}, {})
    speeds = {
        OURS: 600.0,
        PLAIN: 500.0,
        HOPPER: 600.0,
        TUTORIAL: 400.0,
        "sdpa-cudnn": 640.0,
        "sdpa-math": 30.0,
        FLEX: 450.0,
    }
    for case in shapes.suite("speed", GPU):
        if lengths and case.seqlen_q not in lengths:
            continue
        made.cases[case.name] = case
        made.checked[case.name] = "every head"
        for name, base in speeds.items():
            for what in shapes.PASSES:
                factor = (0.6 + 0.4 * min(case.seqlen_q / 8192, 1)) * (0.7 if what == "backward" else 1.0)
                if name == "sdpa-cudnn":  # ours is behind where sequences are long, and ahead where they are short
                    factor = (0.7 if what == "backward" else 1.0) * min(case.head_dim * case.seqlen_q / 2**20, 1)
                tflops = base * factor * (0.85 if case.causal else 1.0)
                ms = shapes.flops(case, what) / tflops / 1e9
                row = Row(case.name, name, what, "ok", latency=Latency(ms, 0.99 * ms, 1.02 * ms, 9), tflops=tflops)
                lost = replace(row, latency=None, tflops=None)
                if name == "sdpa-math" and case.seqlen_q > 8192:
                    row = replace(lost, outcome="oom", reason="CUDA out of memory")
                elif name == TUTORIAL and (case.head_dim == 256 or case.group > 1):
                    row = replace(lost, outcome="absent", reason="the tutorial has not this shape")
                elif name == HOPPER and case.head_dim == 64 and case.causal:
                    row = replace(lost, outcome="wrong", reason="error above its bound: o 1.0e+00 > 1.0e-02")
                elif name == FLEX and case.seqlen_q == 32768:
                    row = replace(lost, outcome="skipped", reason=trial.LATE)
                elif name == FLEX and case.name == "d128 full 512":
                    row = replace(lost, outcome="error", reason=f"{STOPPED}more than 90 s")
                made.add([row])
        made.add([Row(case.name, "flash-attn-4", what, "absent", "not installed") for what in shapes.PASSES])
    rates = {str(n): {"tflops": rate, "low": rate - 5, "high": rate + 5} for n, rate in ((4096, 700.0), (8192, 800.0))}
    made.speed = {
        "ceilings": [
            {"dtype": "bfloat16", "date": "today", "sizes": rates, "tflops": 800.0, "clocks": {"absent": "none"}}
        ],
        "clocks": {},
        "tiles": {},
    }
    return made


def test_the_race_compares_with_each_peer_with_the_best_and_with_the_ceiling() -> None:
    made = made_up()
    found = {(each["case"], each["pass"]): each for each in race.race(made)}
    each = found["d128 full 8192", "forward"]
    assert each["best_peer"] == "sdpa-cudnn"
    assert each["over_best"] == pytest.approx(600 / 640)
    assert each["over_each"][TUTORIAL] == pytest.approx(1.5)
    assert each["over_each"][PLAIN] == pytest.approx(1.2)
    ours = each["peers"][OURS]
    assert (ours["tflops"], ours["of_ceiling"]) == (pytest.approx(600), pytest.approx(0.75))
    assert (ours["low"], ours["high"]) == (pytest.approx(600 / 1.02), pytest.approx(600 / 0.99))
    assert each["peers"]["flash-attn-4"] == {"outcome": "absent", "reason": "not installed"}
    assert found["d128 full 16384", "forward"]["peers"]["sdpa-math"]["outcome"] == "oom"
    made.rows["d128 full 8192", OURS, "forward"].latency = None
    made.rows["d128 full 8192", OURS, "forward"].outcome = "wrong"
    assert race.standing(made, made.cases["d128 full 8192"], "forward")["over_best"] is None


def test_the_report_says_what_was_reached_and_what_was_not() -> None:
    made = made_up()
    found = {figure.name: figure for figure in race.figures(made)}
    assert len(found) == len(race.TARGETS) + 2 * 2 * len(race.LEAD_CASES)
    assert not found["d128 full 8192, forward, TFLOP/s"].met  # 600, wants 610
    assert found["d64 full 8192, forward, TFLOP/s"].met
    assert found[f"d128 full 8192, forward, times {TUTORIAL}"].reached == pytest.approx(1.5)
    assert not found["d128 causal 8192, forward, TFLOP/s"].met
    text = race.report(made)
    for words in ("OOM", "WRONG", "ERROR", "skipped", "MISSED", "reached", "made-up GPU", "0.94x", "75%", "sdpa-cudnn"):
        assert words in text, words
    assert "flash-attn-4: absent: not installed (every case)" in text
    assert f"flex: ERROR: {STOPPED}more than 90 s" in text
    assert text.rstrip().endswith("|"), "the figures to reach come last"
    assert "No GPU speed is measured" not in text


def test_a_race_is_written_and_drawn_again_from_its_file_with_what_has_no_number(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    made, path = made_up(lengths=(16384,)), tmp_path / "speed-float16.json"
    made.save(path)
    race.main([str(path)])
    again = record.load(path)
    assert again.speed == made.speed | {"race": race.race(made)} and again.rows == made.rows
    assert path.with_suffix(".md").read_text() == race.report(made)
    names = {f"speed-float16-{what}.png" for what in (*shapes.PASSES, "ratio")}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    _, panels = race_plot.figure(1, 1, 4, 3)
    race_plot.bars(panels[0][0], made, [made.cases["d128 full 16384"]], ["sdpa-math", OURS], "forward")
    assert [text.get_text().strip() for text in panels[0][0].texts] == ["OOM", "600"]
    titles = [title for line in race_plot.panels_of(made) for title, _ in line]
    assert "head_dim 256, causal" in titles and "32 heads, 8 of keys, head_dim 128, full" in titles


def quick_run(out: Path, *more: str) -> int:
    """The suite as a user runs it on a CPU, on two of its cases."""
    arguments = ["--suite", "speed", "--quick", "--device", "cpu", "--threads", "1", "--cases", "d64 causal"]
    return run.main([*arguments, "--out", str(out), *more])


@pytest.mark.slow
def test_the_suite_runs_from_command_line_to_pictures_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    assert quick_run(tmp_path, "--limit", "0") == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    late = {(row["outcome"], row["reason"]) for row in content["rows"] if row["outcome"] != "absent"}
    assert late == {("skipped", trial.LATE)}

    assert quick_run(tmp_path, "--resume", "--peers", OURS, "sdpa-math", "--apart") == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["case"], row["peer"], row["what"]): row for row in content["rows"]}
    names = ("d64 causal 128", "d64 causal 256")
    for name in names:
        for what in shapes.PASSES:
            assert [rows[name, each, what]["outcome"] for each in (OURS, "sdpa-math")] == ["ok", "ok"]
            assert rows[name, "flex", what]["outcome"] == "absent" and rows[name, "flex", what]["reason"]
            assert rows[name, "sdpa-flash", what]["outcome"] == "skipped"
    assert len(content["speed"]["ceilings"]) == 2
    assert set(content["speed"]["tiles"]) == set(names)
    assert content["speed"]["seconds"][names[0]][OURS] > 0
    each = next(each for each in content["speed"]["race"] if each["case"] == names[0] and each["pass"] == "both")
    assert each["best_peer"] == "sdpa-math" and each["over_best"] == each["over_each"]["sdpa-math"] > 0
    told = capsys.readouterr().out
    assert "No GPU speed is measured here" in told and "d64 full 8192" not in told
    assert (tmp_path / "speed.md").read_text() in told
    assert {path.name for path in tmp_path.glob("*.png")} == {
        *(f"speed-{what}.png" for what in shapes.PASSES), "speed-ratio.png"
    }  # fmt: skip

    monkeypatch.setattr(race_plot, "draw", lambda *told: [])  # once is enough
    assert quick_run(tmp_path, "--resume", "--peers", OURS, "sdpa-math", "--again", OURS) == 0
    again = record.load(tmp_path / "speed.json").rows
    for name in names:
        assert again[name, OURS, "both"].latency != Latency(**rows[name, OURS, "both"]["latency"])
        assert again[name, "sdpa-math", "both"].latency == Latency(**rows[name, "sdpa-math", "both"]["latency"])


def tiled(backend: str, config: Any) -> Record:
    """A race of one case with the tiles that ours had on it."""
    made = made_up()
    kernels = {"forward": {"config": config._asdict(), "reason": "made up"}}
    made.speed["tiles"] = {"d128 full 8192": {PLAIN: {"backend": backend, "target": "cuda:90", "kernels": kernels}}}
    return made


def test_a_compile_report_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash.autotune import resources
    from flash.kernels.spec import Config

    def fails(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError("nvdisasm is not there")

    monkeypatch.setattr(resources, "report", fails)
    made = tiled("triton", Config(128, 64, 8, 2))
    overlap.compile_all(made, deadline=0.0)
    assert [each.found for each in overlap.of(made)] == [{"absent": overlap.LATE}]
    overlap.compile_all(made)
    assert [each.found for each in overlap.of(made)] == [{"absent": "FileNotFoundError: nvdisasm is not there"}]
    assert "FileNotFoundError: nvdisasm is not there" in race.report(made)
    monkeypatch.setattr(resources, "KERNELS", ("forward", "hopper_backward"), raising=False)
    made = tiled("hopper", Config(128, 64, 8, 2))
    overlap.compile_all(made)
    assert next(overlap.of(made)).found == {"absent": "the compile report knows no hopper_forward"}
    made = tiled("torch", Config(128, 64, 8, 2))
    overlap.compile_all(made)
    assert "compiles no kernel" in next(overlap.of(made)).found["absent"]


@pytest.mark.aot
def test_the_compile_report_of_tiles_that_ran_says_what_is_hidden() -> None:
    from flash.kernels.spec import Config

    made = tiled("triton", Config(128, 64, 8, 2))
    overlap.compile_all(made)
    found = next(overlap.of(made)).found
    assert 0 <= found["hidden"] <= 1 and 64 < found["registers"] <= 255 and found["spill_bytes"] >= 0
    assert f"{found['hidden']:.0%}" in race.schedules(made) and "128 64 8 2" in race.schedules(made)
