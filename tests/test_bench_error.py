"""The error suite: what it measures is how far results are from float64, of ours and of every peer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import error, error_report, run
from bench.cases import Case
from bench.error import OUTPUTS, Setting, square
from bench.peers import FLEX, HOPPER, OURS, PEERS, PLAIN, SDPA, STANDARD, Attention, Peer
from flash.attention import flash_attention
from flash.reference import attention

CPU = torch.device("cpu")
THERE = (STANDARD, OURS, "sdpa-flash", "sdpa-math")  # on any CPU, and without a compiler


def setting(dtype: str, seqlen: int = 33, causal: bool = True) -> Setting:
    case = square(f"{dtype} causal", "made up", 2, seqlen, 8, causal, batch=1, dtype=dtype, series="error")
    return Setting(case, (error.normal, error.large, error.outliers))


def measured(*names: str, dtypes: tuple[str, ...] = error.DTYPES, others: tuple[Peer, ...] = ()) -> dict[str, Any]:
    peers = [*(PEERS[name] for name in names), *others]
    return error.measured(CPU, [setting(dtype) for dtype in dtypes], peers, seeds=3)


def off(factor: float) -> Peer:
    """Standard attention, all of it too large by a factor."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        with PEERS[STANDARD].prepare(case, device) as right:
            yield lambda *x: right(*x) * factor

    return Peer("off", "made up", lambda case, device: None, prepare)


def test_errors_of_every_peer_are_measured_against_float64() -> None:
    content = measured(*THERE)
    rows = error_report.rows_of(content)
    for dtype in error.DTYPES:
        eps = torch.finfo(getattr(torch, dtype)).eps
        for peer in THERE:
            found = rows[f"{dtype} causal", peer]
            assert (found["outcome"], found["reason"]) == ("ok", "")
            assert set(found["errors"]) | set(found["without"]) == set(OUTPUTS)
            assert set(found["without"]) <= {"lse"} and ("lse" in found["errors"]) == (peer in (STANDARD, OURS))
            for name, errors in found["errors"].items():
                for number in errors.values():
                    assert 0 <= number["p20"] <= number["median"] <= number["p80"] and number["samples"] == 3
                assert errors["rms"]["median"] <= errors["max"]["median"]
                assert errors["relative"]["median"] < 20 * eps, name
    # half precision is rounded: an error of nothing would mean that both went the same way
    assert rows["bfloat16 causal", OURS]["errors"]["o"]["relative"]["median"] > 1e-4


def test_an_error_is_what_it_is_by_hand() -> None:
    chosen = setting("bfloat16")
    q, k, v, do = error.tensors_of(chosen, CPU, seed=2)
    (row,) = error.measured(CPU, [chosen], [PEERS[OURS]], seed=2, seeds=1)["rows"]
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = attention(*leaves, causal=True, return_lse=True)
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    found = [o, lse, *torch.autograd.grad(o, (q, k, v), do)]
    expected = [want, want_lse, *torch.autograd.grad(want, leaves, do.double())]
    for name, x, y in zip(OUTPUTS, found, expected, strict=True):
        e = (x.double() - y).detach()
        assert row["errors"][name]["rms"]["median"] == pytest.approx(float(e.square().mean().sqrt()), rel=1e-9), name
        assert row["errors"][name]["max"]["median"] == pytest.approx(float(e.abs().max()), rel=1e-9), name


def test_a_result_that_is_one_percent_off_is_seen_to_be() -> None:
    content = measured(dtypes=("float64",), others=(off(1.01),))
    errors = content["rows"][0]["errors"]
    assert all(errors[name]["relative"]["median"] == pytest.approx(0.01, rel=1e-6) for name in ("o", "dq", "dk", "dv"))


def test_nan_is_no_small_error() -> None:
    (row,) = measured(dtypes=("float32",), others=(off(float("nan")),))["rows"]
    assert row["outcome"] == "wrong" and "NaN" in row["reason"]


def test_a_peer_that_raises_says_why_and_costs_no_other_its_row() -> None:
    def refuses(*operands: Tensor) -> Tensor:
        raise RuntimeError("no such shape\nmore")

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        yield refuses

    broken = Peer("broken", "made up", lambda case, device: None, prepare)
    first, second = measured(OURS, dtypes=("float32",), others=(broken,))["rows"]
    assert first["outcome"] == "ok"
    assert second["outcome"] == "error" and second["reason"] == "RuntimeError: no such shape"


def test_where_a_peer_is_more_exact_is_marked_and_listed() -> None:
    content = measured(STANDARD, OURS, dtypes=("float32",))
    ours = error_report.rows_of(content)["float32 causal", OURS]["errors"]["o"]
    theirs = error_report.rows_of(content)["float32 causal", STANDARD]["errors"]["o"]
    ours["rms"], theirs["rms"] = ({**ours["rms"], "median": x} for x in (3e-7, 1e-7))
    text = error_report.report(content)
    assert "- float32 causal, o: rms 3.00x that of standard" in text
    assert "float32 causal, o" in error_report.worse(content)
    (line,) = [line for line in text.splitlines() if line.startswith("| causal, o ")]
    assert "<" in line.split("|")[3] and "<" not in line.split("|")[2]


def test_distributions_are_as_they_are_described() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10**6, generator=generator)
    assert torch.equal(error.normal(x, generator), x)
    q, k = error.large(x, generator), error.large(-x, generator)
    assert float((q * k).mean() / (x * -x).mean()) == pytest.approx(error.LOGITS)
    moved = error.outliers(x, generator) - x
    assert float((moved != 0).double().mean()) == pytest.approx(error.RARE, rel=0.2)
    assert float(moved[moved != 0].std()) == pytest.approx(error.FAR, rel=0.2)


def test_every_dtype_has_every_distribution_and_a_long_case() -> None:
    found = error.settings()
    assert len({setting.case.name for setting in found}) == len(found)
    for dtype in error.DTYPES:
        own = [setting for setting in found if setting.case.dtype == dtype]
        assert {error.normal, error.large, error.outliers} <= {draw for setting in own for draw in setting.draw}
        assert max(setting.case.seqlen_k for setting in own) >= 4096
        assert len({setting.case.head_dim for setting in own}) > 1
        assert {setting.case.causal for setting in own} == {False, True}


def test_kernels_are_among_the_peers() -> None:
    assert {OURS, PLAIN, HOPPER, FLEX, STANDARD, SDPA} <= set(PEERS)
    assert set(error.LSE) <= set(PEERS)


def test_the_report_names_machine_versions_seeds_and_what_did_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = measured(STANDARD, OURS, "sdpa-cudnn", dtypes=("float32", "bfloat16"))
    assert error_report.write(content, tmp_path) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "seeds 0 to 2" in text and "no GPU was used" in text
    assert "sdpa-cudnn: absent: PyTorch has this backend for CUDA only" in text
    assert json.loads((tmp_path / "error.json").read_text()) == content
    assert (tmp_path / "error.png").stat().st_size > 10000


@pytest.mark.slow
def test_the_suite_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.run", "--suite", "error", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=run.RESULTS.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "error.json").read_text())
    assert {row["peer"] for row in content["rows"]} == set(PEERS) - {SDPA}
    assert done.stdout.strip() == (tmp_path / "error.md").read_text().strip()


def test_results_that_cannot_be_written_are_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    content = measured(STANDARD, OURS)
    assert error_report.write(content, tmp_path / "file" / "out") == 5
    out, err = capsys.readouterr()
    assert "Cells: median rms of the error" in out and err.splitlines()[-1].startswith("cannot write")
