"""What "the fastest attention written in Triton" promises, one test a promise.

Figures on a GPU are read from committed runs of `python -m bench.run --suite speed`; whoever commits one is held to it.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.autotune import tables
from flash.kernels.spec import Config

ROOT = Path(__file__).parents[1]
RUNS = [path for path in sorted(ROOT.glob("bench/results/*/speed.json")) if "h200" in path.parent.name.lower()]
MEASURED = pytest.mark.xfail(not RUNS, strict=True, reason="has not run on an H200 yet")
TARGETS = [  # TFLOP/s at length 8192 in bfloat16
    ("d128 full 8192", "forward", 610),
    ("d128 causal 8192", "forward", 580),
    ("d64 full 8192", "forward", 480),
    ("d256 causal 8192", "forward", 600),
    ("d128 full 8192", "backward", 470),
    ("d128 causal 8192", "backward", 430),
]


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


@MEASURED
@pytest.mark.parametrize(("case", "what", "target"), TARGETS)
def test_a_figure_is_reached(case: str, what: str, target: float) -> None:
    assert RUNS
    for run in RUNS:
        rows = [row for row in json.loads(run.read_text())["rows"] if (row["case"], row["what"]) == (case, what)]
        assert max(row["tflops"] for row in rows if row["peer"].startswith("flash")) >= target


@MEASURED
@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize("peer", ["tutorial", "flex"])
def test_ours_is_ahead_of_what_is_written_in_triton(peer: str, what: str) -> None:
    assert RUNS
    for run in RUNS:
        rows = [row for row in json.loads(run.read_text())["rows"] if row["what"] == what and row["latency"]]
        for row in rows:
            if row["peer"] == peer:
                ours = [r for r in rows if r["case"] == row["case"] and r["peer"].startswith("flash")]
                assert 1.3 * min(r["latency"]["median"] for r in ours) <= row["latency"]["median"]
