"""Peers that are timed in turn: whose sample comes when, and what becomes of those that cannot be timed."""

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import cases as shapes
from bench import run
from bench.peers import OURS, PEERS, STANDARD
from bench.trial import LATE
from tests.test_bench import FAST, TINY, measured, peer, right, scaled

IN_TURN = replace(FAST, in_turn=True)


def test_a_row_is_the_median_of_its_own_samples_taken_in_turn() -> None:
    called: list[str] = []

    def sleeps(name: str, seconds: float):  # noqa: ANN202 - an Attention
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            called.append(name)
            time.sleep(seconds)
            return right(TINY)(q, k, v)

        return attention

    made = measured(peer("flex", sleeps("flex", 0.0)), peer("sdpa", sleeps("sdpa", 0.01)), settings=IN_TURN)
    checks, samples = called[:4], called[4:]
    assert checks == ["flex"] * 2 + ["sdpa"] * 2  # forward and both, each
    # forward, backward, both: the graph of backward is made with its first sample
    first, later = ["flex"] * 3 + ["sdpa"] * 3, ["flex"] * 2 + ["sdpa"] * 2
    assert samples == first + later * (IN_TURN.effort.samples - 1)
    for what in ("forward", "both"):
        fast, slow = (made.rows["tiny", name, what] for name in ("flex", "sdpa"))
        assert fast.latency is not None and slow.latency is not None
        assert slow.latency.p20 >= 10 and fast.latency.median < slow.latency.median
        assert slow.latency.samples == IN_TURN.effort.samples
        assert slow.tflops == pytest.approx(shapes.flops(TINY, what) / slow.latency.median / 1e9)


def test_each_row_says_what_became_of_it() -> None:
    calls = 0

    def breaks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:  # the checks take two, the first samples two or three
            raise MemoryError
        return right(TINY)(q, k, v)

    found = (
        peer("flex", TypeError("unexpected")),
        peer("sdpa", AssertionError("not to be called"), absent="on holiday"),
        peer("sdpa-math", scaled),
        peer("sdpa-flash", breaks),
    )
    made = measured(PEERS[STANDARD], *found, PEERS[OURS], settings=IN_TURN)
    outcomes = {row.peer: row.outcome for row in made.rows.values() if row.what == "both"}
    assert outcomes == {
        STANDARD: "ok", "flex": "error", "sdpa": "absent", "sdpa-math": "wrong", "sdpa-flash": "oom", OURS: "ok",
    }  # fmt: skip
    assert all((row.latency is not None) == (row.outcome == "ok") for row in made.rows.values())


def test_what_the_time_limit_cuts_off_is_skipped_or_has_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    made = measured(PEERS[STANDARD], settings=replace(IN_TURN, deadline=0.0))
    assert {(row.outcome, row.reason) for row in made.rows.values()} == {("skipped", LATE)}

    over = time.monotonic() + 1e6
    count = 0

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 4:  # two checks, a forward, and the graph of backward
            monkeypatch.setattr(time, "monotonic", lambda: over + 1)
        return right(TINY)(q, k, v)

    rows = measured(peer("flex", slow), settings=replace(IN_TURN, deadline=over)).rows
    assert [rows["tiny", "flex", what].outcome for what in shapes.PASSES] == ["ok", "ok", "skipped"]
    assert (found := rows["tiny", "flex", "forward"].latency) is not None and found.samples == 1


@pytest.mark.parametrize(("suite", "device", "wanted"), [
    ("features", "cpu", True), ("long", "cpu", True), ("cpu", "cpu", False), ("features", "cuda", False),
])  # fmt: skip
def test_features_are_timed_in_turn_on_a_cpu_and_say_so(suite: str, device: str, wanted: bool) -> None:
    args = run.parse(["--suite", suite, "--device", device])
    settings = run.settings_of(args)
    assert settings.in_turn == wanted and settings.device == torch.device(device)
    assert ("in turn" in str(run.described(args, settings)["timer"])) == wanted
