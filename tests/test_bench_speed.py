"""The speed suite: its cases and their order, peers in processes of their own, the ceiling, the race in text and picture."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import apart, ceiling, check, overlap, peers, race, race_plot, record, run, trial
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
    assert reason is not None and reason.startswith("backend 'hopper' does not serve float32")
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
    if job["peer"] == "dies":
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
        rows = children.measure(SMALL, peer("dies", right(SMALL)), *expected, FAST)
        assert rows[0].outcome == "error" and rows[0].reason == f"{STOPPED}the process ended with 3"
        assert children.stops == {("hangs", "backward"): 1, ("dies", "forward"): 1, ("dies", "backward"): 1}
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


def test_clocks_are_read_by_name_or_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ceiling.answer("1980 MHz, 3201 MHz, 612.33 W, 54\n345 MHz, 3201 MHz, 70.00 W, 30\n") == {
        "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "power.draw": "612.33 W", "temperature.gpu": "54"
    }  # fmt: skip
    assert "No devices" in ceiling.answer("No devices were found\n")["absent"]
    monkeypatch.setattr(ceiling, "question", lambda: ["no-such-program-here"])
    assert "no-such-program-here" in ceiling.clocks(GPU)["absent"]
    assert "no-such-program-here" in ceiling.clocks_under(lambda: None, GPU)["absent"]
