"""What "the fastest attention written in Triton" promises, one test a promise.

Figures on a GPU are read from committed runs of `python -m bench.run --suite speed`; whoever commits one is held to it.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import Latency
from bench.peers import OURS_ALL
from bench.race import LEAD, LEAD_CASES, RIVALS, TARGETS
from bench.record import Record, Row, load
from flash.autotune import tables
from flash.kernels.spec import Config

ROOT = Path(__file__).parents[1]
RUNS = [path for path in sorted(ROOT.glob("bench/results/*/speed.json")) if "h200" in path.parent.name.lower()]
MEASURED = pytest.mark.xfail(not RUNS, strict=True, reason="has not run on an H200 yet")


def named_test(module: str, name: str) -> Any:
    """A test that must be there, by the file and the name it has."""
    return getattr(importlib.import_module(f"tests.{module}"), name)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_forward_hides_its_exponentials_on_hopper(head_dim: int) -> None:
    """The next tile's products are under way while this one's exponentials are taken."""
    found = tables.lookup("cuda:90", "forward", "bfloat16", head_dim, 8192, False)
    assert getattr(found.config, "ahead", False)


def test_the_longest_tiles_come_first_and_heads_of_a_group_run_side_by_side() -> None:
    named_test("test_tile", "test_programs_start_group_by_group_and_tile_by_tile")
    named_test("test_tile", "test_packed_programs_start_with_the_last_tile_where_it_has_most_to_do")


@pytest.mark.parametrize("name", ["hopper_forward", "hopper_backward"])
def test_hopper_kernels_equal_the_oracle_in_simulation(name: str) -> None:
    importlib.import_module(f"tests.test_{name}")
    importlib.import_module(f"flash.kernels.{name}")


@pytest.mark.parametrize("name", ["hopper_forward", "hopper_backward"])
def test_every_shipped_hopper_configuration_is_compiled_in_the_tests(name: str) -> None:
    configs = importlib.import_module(f"flash.kernels.{name}").CONFIGS
    assert configs and all(isinstance(config, Config) for choices in configs.values() for config in choices)


def test_what_hopper_does_not_serve_is_said() -> None:
    from flash import info

    q = torch.randn(1, 1, 4, 64, dtype=torch.float16)
    assert "9.0" in info(q)["backends"]["hopper"]


def test_the_launch_is_found_by_a_key_and_measured() -> None:
    importlib.import_module("bench.overhead")


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
    for check, asked in ((check_figure, TARGETS), (check_lead, LEADS)):
        for each in asked:
            try:
                check(run, *each)
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
