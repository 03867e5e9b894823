"""What "the fastest attention written in Triton" promises, one test a promise.

Figures on a GPU are read from committed runs of `python -m bench.run --suite speed`; whoever commits one is held to it.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import Latency
from bench.peers import OURS_ALL
from bench.race import LEAD, LEAD_CASES, RIVALS, TARGETS
from bench.record import Record, Row, load
from flash.autotune import resources, tables
from flash.autotune.space import Variant
from tests import calls
from tests.bounds import check
from tests.drivers import printed

ROOT = Path(__file__).parents[1]
RUNS = [path for path in sorted(ROOT.glob("bench/results/*/speed.json")) if "h200" in path.parent.name.lower()]
MEASURED = pytest.mark.skipif(not RUNS, reason="needs a run on an H200, of which there is none yet")


def named_test(module: str, name: str) -> Callable[..., None]:
    """A test that must be there by the file and the name it has, and do something."""
    test = getattr(importlib.import_module(f"tests.{module}"), name)
    assert inspect.isfunction(test), f"{module}.{name} is {test!r}"
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(test))).body
    done = [node for line in function.body for node in ast.walk(line) if isinstance(node, ast.Assert | ast.Call)]
    assert done, f"{module}.{name} does nothing"
    return test


def test_what_is_no_test_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty() -> None:
        """Nothing."""

    module, name = "test_tile", "test_programs_start_group_by_group_and_tile_by_tile"
    for instead in (None, empty):
        monkeypatch.setattr(importlib.import_module(f"tests.{module}"), name, instead)
        with pytest.raises(AssertionError, match=name):
            named_test(module, name)


def hidden(head_dim: int, causal: bool) -> float:
    """The share of exponentials that the plain forward as shipped for sm_90 issues under matrix products."""
    config = tables.lookup("cuda:90", "forward", "bfloat16", head_dim, 8192, causal).config
    made = resources.report("cuda:90", "forward", Variant("bfloat16", head_dim, head_dim, causal), config, listing=True)
    assert made.hidden is not None
    return made.hidden


@pytest.mark.aot
def test_the_forward_hides_its_exponentials_on_hopper() -> None:
    """The next tile's products are under way while this one's exponentials are taken."""
    assert hidden(128, False) >= 0.9


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("head_dim, causal", [(64, False), (64, True), (128, True), (256, False), (256, True)])
def test_where_it_hides_fewer_the_limits_say_how_many(head_dim: int, causal: bool) -> None:
    share = hidden(head_dim, causal)
    assert share < 0.9, "better than docs/limits.md says"
    limits = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    (said,) = (limit for limit in limits.split("\n- ") if "exponentials" in limit)
    assert f"head_dim {head_dim}" in said and (f"{100 * share:.0f} %" if share else "none") in said


def test_the_longest_tiles_come_first_and_heads_of_a_group_run_side_by_side() -> None:
    named_test("test_tile", "test_programs_start_group_by_group_and_tile_by_tile")
    named_test("test_tile", "test_packed_programs_start_with_the_last_tile_where_it_has_most_to_do")


@pytest.mark.interpret(gpu=False)
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_hopper_kernels_equal_the_oracle_in_simulation(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """test_hopper_forward.py and test_hopper_backward.py have every kind of call."""
    pytest.importorskip("triton.experimental.gluon")
    from tests.interpreter.gluon import Simulated
    from tests.test_hopper_backward import ALL, launch
    from tests.test_hopper_forward import call

    kernels = importlib.import_module(f"flash.kernels.hopper_{part}")
    monkeypatch.setattr(kernels, f"{part}_kernel", Simulated(getattr(kernels, f"{part}_kernel")))
    x = calls.random_inputs(lambda t: t, seqlen_q=130, head_dim=64, dtype=torch.float16, causal=True)
    check(call(x) if part == "forward" else launch(x, ALL, 2, calls.forward(x)), x)


def compiled(name: str, call: str) -> set[tuple[int, Any]]:
    """(head_dim, config) of the parameters with which a test of test_hopper_compiled.py compiles a kind of call."""
    marks = named_test("test_hopper_compiled", name).pytestmark  # type: ignore[attr-defined]
    (found,) = (mark.args[1] for mark in marks if mark.name == "parametrize" and "config" in mark.args[0])
    given = (getattr(each, "values", each) for each in found)
    return {(head_dim, config) for head_dim, config, kind in given if kind == call}


def test_every_shipped_hopper_configuration_is_compiled_in_the_tests() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from flash.kernels import hopper_backward, hopper_forward
    from tests import test_hopper_compiled

    assert test_hopper_compiled.pytestmark.name == "aot"
    for call, options in test_hopper_compiled.FORWARDS.items():
        found = compiled("test_every_shipped_forward_hides_the_softmax_and_spills_nothing", call)
        shipped = [(d, each) for (d, banded), each in hopper_forward.CONFIGS.items() if banded == bool(options)]
        assert found == {(head_dim, config) for head_dim, configs in shipped for config in configs}, call
    for call in ("full", "causal, groups", "window"):
        found = compiled("test_main_loops_of_the_backward_touch_no_local_memory_and_hide_their_exponentials", call)
        assert found == {(d, config) for d, configs in hopper_backward.CONFIGS.items() for config in configs}, call


def test_a_gpu_repeats_every_kernel_on_twelve_shapes() -> None:
    test = named_test("test_repeats", "test_the_same_call_gives_the_same_bits")
    given = {mark.name if mark.name != "parametrize" else mark.args[0]: mark for mark in test.pytestmark}  # type: ignore[attr-defined]
    assert given.keys() == {"gpu", "shape", "backend", "part"} and len(given["shape"].args[1]) == 12
    assert importlib.import_module("tests.test_repeats").TIMES == 250


def test_compute_sanitizer_is_given_tests_of_every_kernel_that_run_on_a_gpu() -> None:
    pytest.importorskip("triton.experimental.gluon")
    names = re.findall(r"^\t(tests/test_\w+\.py::\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    files = {name.partition("::")[0] for name in names}
    assert files == {
        f"tests/test_{kernel}.py" for kernel in ("forward", "backward", "hopper_forward", "hopper_backward")
    }
    elsewhere = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in names if name not in done.stdout] == []


def test_what_hopper_does_not_serve_is_said() -> None:
    from flash import info

    q = torch.randn(1, 1, 4, 64, dtype=torch.float16)
    assert "9.0" in info(q)["backends"]["hopper"]


MEASURE = """
import json
import torch
from triton.runtime import driver

from bench import overhead
from flash.attention import flash_attention
from flash.problem import Problem

overhead.pretend()
overhead.ROUND, overhead.ROUNDS = 1e-4, 3
launched, checked, timed = [], [], []
driver.active.launcher_cls = lambda source, metadata: lambda *args: launched.append(source)
with torch.no_grad():
    rows = overhead.microseconds(overhead.rows(torch.device("cpu")))
check = Problem.of
Problem.of = staticmethod(lambda *args, **options: checked.append(args) or check(*args, **options))
q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
counts = []
with torch.no_grad():
    for calls in (1, 5):
        launched.clear(), checked.clear()
        for _ in range(calls):
            flash_attention(q, q, q, causal=True)
        counts.append([len(launched), len(checked)])
overhead.microseconds({"": lambda: timed.append(0)})
print(json.dumps([rows, counts, len(timed)]))
"""


@pytest.mark.aot
def test_the_launch_is_found_by_a_key_and_measured() -> None:
    pytest.importorskip("triton")
    rows, (first, later), timed = printed(MEASURE, prelude="")
    assert first == [1, 1] and later == [5, 0], "each call is launched, and checked only where its key is new"
    assert timed > 11 and (timed - 11) % 3 == 0, (
        "one call that compiles, ten that tell how many make a round, three rounds"
    )
    served = {name: value for name, value in rows.items() if name != "SDPA: torch.func.jvp"}  # torch has none
    assert all(value > 0 for value in served.values()), rows
    assert rows["torch.empty_like"] < rows["flash_attention"] < rows["without a plan"], rows


def test_the_speed_suite_knows_its_peers() -> None:
    from bench.run import parse

    assert parse(["--suite", "speed"]).suite == "speed"
    from bench.peers import PEERS

    for peer in ("tutorial", "flex", "sdpa-cudnn", "sdpa-flash", "flash-attn-4"):
        assert peer in PEERS


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"])
@pytest.mark.parametrize("kernel", tables.KERNELS)
def test_every_gpu_has_a_choice_and_its_basis(target: str, kernel: str) -> None:
    for head_dim in (64, 128, 256):
        choice = tables.lookup(target, kernel, "bfloat16", head_dim, 8192, True)
        assert choice.reason and choice.config.block_m >= 16


def ours(run: Record, case: str, what: str) -> Row:
    """The fastest of what a user can have of ours, by any backend; rows without a number are passed over."""
    rows = [row for peer in OURS_ALL if (row := run.row(case, peer, what)) and row.latency and row.tflops]
    assert rows, f"none of {OURS_ALL} has a number for {case}, {what}"
    return max(rows, key=lambda row: row.tflops or 0.0)


def check_figure(run: Record, case: str, what: str, target: float) -> None:
    """Ours reaches a rate, in TFLOP/s."""
    assert (ours(run, case, what).tflops or 0.0) >= target


def check_lead(run: Record, case: str, what: str, rival: str) -> None:
    """Ours takes a rival's time over LEAD at most; a rival without a number proves nothing."""
    own, theirs = ours(run, case, what).latency, run.row(case, rival, what)
    assert own and theirs and theirs.latency, f"{rival} has no number for {case}, {what}"
    assert LEAD * own.median <= theirs.latency.median


LEADS = [(case, what, rival) for rival in RIVALS for what in ("forward", "backward") for case in LEAD_CASES]


@MEASURED
@pytest.mark.parametrize(("case", "what", "target"), TARGETS)
def test_a_figure_is_reached(case: str, what: str, target: float) -> None:
    assert RUNS
    for run in RUNS:
        check_figure(load(run), case, what, target)


@MEASURED
@pytest.mark.parametrize(("case", "what", "rival"), LEADS)
def test_ours_is_ahead_of_what_is_written_in_triton(case: str, what: str, rival: str) -> None:
    assert RUNS
    for run in RUNS:
        check_lead(load(run), case, what, rival)


def made_up(**rates: float | None) -> Record:
    """A run in which each peer has one rate, in TFLOP/s, in every case; None: the peer was there and has no number."""
    run = Record({}, {}, {}, {}, {})
    for peer, rate in rates.items():
        took = Latency(1e3 / rate, 1e3 / rate, 1e3 / rate, 9) if rate else None
        for case, what, _ in (*TARGETS, *LEADS):
            outcome = "ok" if rate else "skipped"
            run.add([Row(case, peer.replace("_", "-"), what, outcome, latency=took, tflops=rate)])
    return run


def missed(run: Record) -> int:
    """How many of the checks above a run fails."""
    count = 0
    for asks, asked in ((check_figure, TARGETS), (check_lead, LEADS)):
        for each in asked:
            try:
                asks(run, *each)
            except AssertionError:
                count += 1
    return count


def test_the_speed_of_others_is_not_ours() -> None:
    every = len(TARGETS) + len(LEADS)
    written = {"tutorial": 400.0, "flex": 450.0}
    assert missed(made_up(flash=1.0, flash_attn_4=800.0, flash_attn_3=800.0, **written)) == every
    assert missed(made_up(flash_attn_4=800.0, **written)) == every
    assert missed(made_up(flash=620.0, flash_hopper=None, flash_triton=1.0, **written)) == 0
    assert missed(made_up(flash=None, flash_hopper=620.0, **written)) == 0
    assert missed(made_up(flash=609.0, flash_attn_4=800.0, **written)) == 1
    assert missed(made_up(flash=620.0, tutorial=400.0, flex=None)) == len(LEADS) // 2
    assert missed(made_up(flash=620.0, tutorial=500.0, flex=450.0)) == len(LEADS) // 2
