"""The sweep survives what happens to sweeps: kills, crashes, hangs, wrong and broken candidates, files half written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.autotune import measure, offline, store, sweep, tables, worker
from flash.autotune.journal import Journal
from flash.autotune.listing import Loop
from flash.autotune.measure import Job
from flash.autotune.resources import Report
from flash.autotune.space import Variant
from flash.kernels.spec import Config

ROOT = Path(__file__).parents[1]
TARGET, GPU = "cuda:90", "NVIDIA H200"
EVERY = list(sweep.cells(TARGET, ["bfloat16"], [64], [1024, 8192]))
CELLS = [cell for cell in EVERY if cell.need.kernel in tables.KERNELS]


def compile(target: str, kernel: str, variant: Variant, config: Config, listing: bool = False) -> Report:
    """Large tiles do not fit, middling ones spill, the rest is fine."""
    area = config.block_m * config.block_n
    return Report(target, 100, 40 if area > 4096 else 0, area * 20, 128 * 128 * 19, 0, (), ())


def fast_when_small(job: Job) -> worker.Outcome:
    return {"status": "ok", "ms": job.config.block_m + job.config.block_n / 1000 + job.config.num_warps / 1e6}


def swept(
    path: Path, run: Callable[[Job], worker.Outcome] = fast_when_small, answers: Callable[[], bool] = lambda: False
) -> tables.Table:
    return sweep.sweep(TARGET, GPU, CELLS, compile, run, Journal(path), answers=answers)


def hopper_cells() -> list[sweep.Cell]:
    """A cell for each (kernel, head_dim, causal) that a sweep gives the Gluon kernels."""
    found = sweep.cells(TARGET, ["bfloat16"], tables.HEAD_DIMS, [1024])
    return [cell for cell in found if cell.need.kernel in tables.HOPPER]


def test_hopper_kernels_are_timed_where_they_run() -> None:
    assert {cell.need.kernel for cell in EVERY} == {*tables.KERNELS, *tables.HOPPER}
    others = [*sweep.cells("cuda:80", ["bfloat16"], [64], [1024]), *sweep.cells(TARGET, ["float32"], [64], [1024])]
    assert {cell.need.kernel for cell in others} == {*tables.KERNELS}
    wide = {cell.need.kernel for cell in sweep.cells(TARGET, ["bfloat16"], [256], [1024])}
    assert wide == {*tables.KERNELS, "hopper_forward"}


def shipped(cell: sweep.Cell) -> list[Config]:
    from flash.kernels import hopper_backward, hopper_forward

    module = hopper_forward if cell.need.kernel == "hopper_forward" else hopper_backward
    return list(module.candidates(cell.need.head_dim, cell.causal))


def test_every_tile_that_a_hopper_kernel_ships_is_timed_whatever_it_spills() -> None:
    seen: list[Variant] = []

    def spills(target: str, kernel: str, variant: Variant, config: Config) -> Report:
        seen.append(variant)
        return Report(target, 168, 4 * config.num_stages + config.num_warps, 1000, 128 * 128 * 19, 0, (), ())

    for cell in hopper_cells():
        seen.clear()
        assert list(sweep.survivors(TARGET, cell.need, spills)) == shipped(cell), cell
        assert {variant.causal for variant in seen} == {cell.causal}


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=f"{cell.need.kernel}-{cell.need.head_dim}-{'causal' if cell.causal else 'full'}")
        for cell in hopper_cells()
        if cell.need.head_dim >= 64  # smaller heads lie in tiles of 64 too
    ],
)
def test_every_tile_that_a_hopper_kernel_ships_survives_the_compiler(cell: sweep.Cell) -> None:
    from flash.autotune.resources import report

    assert list(sweep.survivors(TARGET, cell.need, report)) == shipped(cell)


def test_fastest_right_candidate_wins_its_cell(tmp_path: Path) -> None:
    tried: list[Job] = []

    def run(job: Job) -> worker.Outcome:
        tried.append(job)
        if job.config.block_m == 32:
            return {"status": "wrong", "note": "o"}
        return fast_when_small(job)

    table = swept(tmp_path / "journal", run)
    assert (table.target, table.gpu, table.timed, table.kernels) == (TARGET, GPU, True, tables.kernel_hash())
    assert [(row.kernel, row.causal, row.seqlen) for row in table.rows] == [
        (cell.need.kernel, cell.causal, cell.seqlen) for cell in CELLS
    ]
    for row in table.rows:
        rivals = [job for job in tried if (job.kernel, job.causal, job.seqlen) == (row.kernel, row.causal, row.seqlen)]
        right = [fast_when_small(job)["ms"] for job in rivals if job.config.block_m != 32]
        assert 1 < len(rivals) <= sweep.SURVIVORS and row.ms == min(right)
        assert row.config.block_m != 32


@pytest.mark.parametrize("status", ["wrong", "oom", "compile_error", "error", "timeout"])
def test_cell_without_a_right_candidate_has_no_row(tmp_path: Path, status: str) -> None:
    def run(job: Job) -> worker.Outcome:
        return {"status": status, "note": ""} if job.kernel == "dq" else fast_when_small(job)

    table = swept(tmp_path / "journal", run, lambda: True)
    assert {row.kernel for row in table.rows} == {"forward", "dkdv"}
    assert status in sweep.summary(Journal(tmp_path / "journal"))


def test_only_what_fits_is_timed_and_nothing_that_spills_beside_what_does_not() -> None:
    found = sweep.survivors(TARGET, CELLS[0].need, compile)
    assert len(found) == sweep.SURVIVORS
    assert all(config.block_m * config.block_n <= 4096 and not f.spill_bytes for config, f in found.items())


def test_candidate_that_does_not_compile_is_not_timed() -> None:
    def fails(target: str, kernel: str, variant: Variant, config: Config) -> Report:
        if config.num_warps == 8:
            raise RuntimeError("PassManager::run failed")
        return compile(target, kernel, variant, config)

    assert {config.num_warps for config in sweep.survivors(TARGET, CELLS[0].need, fails)} == {4}


def test_killed_sweep_goes_on_to_the_same_table_wherever_it_was(tmp_path: Path) -> None:
    whole = swept(tmp_path / "whole")
    text = (tmp_path / "whole").read_bytes()
    dice = random.Random(0)
    for _ in range(20):
        path = tmp_path / "killed"
        at = dice.randrange(len(text))
        path.write_bytes(text[:at])
        done = sum('"status"' in line for line in text[:at].decode().split("\n")[:-1])
        again = []

        def run(job: Job, again: list[Job] = again) -> worker.Outcome:
            again.append(job)
            return fast_when_small(job)

        assert swept(path, run) == whole
        assert len(again) == text.count(b'"status"') - done or len(again) == text.count(b'"status"') - done - 1
        assert swept(path) == whole


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_sweep
left = [7]
def run(job):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return test_sweep.fast_when_small(job)
test_sweep.swept(Path(sys.argv[1]), run)
"""


def test_outcomes_outlive_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    done = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert sum(isinstance(value, dict) for value in Journal(path).entries.values()) == 6
    assert swept(path) == swept(tmp_path / "whole")


@pytest.mark.parametrize("junk", [b"\0\0\0", b"[]\n", b'{"key": 1}\n', b"\xff\n", b"[" * 9999 + b"\n", b'"text"\n'])
def test_journal_passes_over_what_is_not_its_own(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "journal"
    Journal(path).write("a", 1)
    with path.open("ab") as file:
        file.write(junk)
    Journal(path).write("b", [2])
    assert Journal(path).entries == {"a": 1, "b": [2]}


def test_three_crashes_in_a_row_stop_the_sweep_and_keep_what_was_found(tmp_path: Path) -> None:
    path, jobs = tmp_path / "journal", []

    def run(job: Job) -> worker.Outcome:
        jobs.append(job)
        return {"status": "crash", "note": "CUDA error"} if len(jobs) > 5 else fast_when_small(job)

    with pytest.raises(sweep.Gone, match="3 candidates in a row"):
        swept(path, run)
    assert len(jobs) == 8
    assert sum(value["status"] == "ok" for value in Journal(path).entries.values() if isinstance(value, dict)) == 5


def runner(job: str) -> worker.Outcome:
    """Runs in the child."""
    if job == "abort":
        os.abort()
    if job == "sleep":
        time.sleep(60)
    if job == "raise":
        raise RuntimeError("broken")
    return {"status": "ok", "ms": float(len(job))}


@pytest.mark.slow
def test_child_that_crashes_or_hangs_costs_only_its_own_job() -> None:
    child = worker.Worker("tests.test_sweep:runner", timeout=20)
    try:
        assert child.run("fine") == {"status": "ok", "ms": 4.0}
        assert child.run("abort") == {"status": "crash", "note": f"the process ended with {-signal.SIGABRT}"}
        assert child.run("raise") == {"status": "error", "note": "RuntimeError: broken"}
        child.timeout = 0.2
        assert child.run("sleep")["status"] == "timeout"
        child.timeout = 20
        assert child.run("fine")["status"] == "ok"
    finally:
        child.close()


def test_child_that_cannot_start_says_so() -> None:
    with pytest.raises(RuntimeError, match="ended as it started"):
        worker.Worker("tests.test_sweep:absent", timeout=20).run("fine")


class OutOfResources(Exception):
    pass


class CompilationError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (OutOfResources("shared memory"), "oom"),
        (CompilationError("at 3:5"), "compile_error"),
        (RuntimeError("PassManager::run failed"), "compile_error"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash"),
        (ZeroDivisionError(), "error"),
    ],
)
def test_exception_is_recorded_as_what_it_means(error: Exception, status: str) -> None:
    def fails(job: Any) -> worker.Outcome:
        raise error

    def fails_deeper(job: Any) -> worker.Outcome:
        raise ValueError("config must fit") from error

    for each in (fails, fails_deeper):
        outcome = worker.attempt(each, None)
        assert outcome["status"] == status
        assert len(outcome["note"]) < 300


def table(*rows: tables.Row) -> tables.Table:
    return tables.Table(TARGET, GPU, "3.7.1", tables.kernel_hash(), any(row.ms for row in rows), rows)


def row(head_dim: int, **fields: Any) -> tables.Row:
    made = tables.Row("forward", "bfloat16", head_dim, None, None, None, Config(64, 32), 1000, 0)
    return made._replace(**fields)


def read(path: Path) -> tables.Table:
    return tables.parse(path.read_bytes())


def test_saving_keeps_rows_that_the_new_table_says_nothing_of(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    store.save(path, table(row(16), row(32)))
    store.save(path, table(row(32, config=Config(16, 16), ms=2.0), row(64)))
    assert read(path).rows == (row(16), row(32, config=Config(16, 16), ms=2.0), row(64))
    assert read(path).timed
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(path.parent)) == ["table.json", "table.json.lock"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    rows = [row(d, seqlen=n) for d in tables.HEAD_DIMS for n in (16, 32, 64, 128)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: store.save(path, table(each)), rows))
    assert set(read(path).rows) == set(rows)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "table.json"
    store.save(path, table(row(16)))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space"):
        store.save(path, table(row(32)))
    assert read(path).rows == (row(16),)
    assert not list(tmp_path.glob("*.tmp"))


def test_file_that_is_no_table_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="ignoring the table"):
        store.save(path, table(row(16)))
    assert read(path).rows == (row(16),)
    assert (tmp_path / "table.json.bad").read_text() == "{"


def test_without_a_gpu_one_line_and_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep.main([]) == 4
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--offline" in err


def test_offline_writes_an_untimed_table_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(tables, "triton_version", lambda: "3.7.1")
    arguments = ["--offline", TARGET, "--dtype", "bfloat16", "--head-dim", "64", "--output", str(path)]

    def killed(*args: Any) -> Report:
        raise KeyboardInterrupt

    calls = []

    def counted(*args: Any, **options: Any) -> Report:
        calls.append(args)
        return compile(*args, **options) if len(calls) < 20 else killed()

    monkeypatch.setattr(sweep, "compile_apart", lambda worker: counted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(arguments)
    assert not path.exists()
    monkeypatch.setattr(sweep, "compile_apart", lambda worker: compile)
    assert sweep.main(arguments) == 0
    made = read(path)
    assert not made.timed and made.gpu == made.kernels == "" and "ms" in json.loads(path.read_text())["rows"][0]
    needs = [offline.Need(*each[:5]) for each in made.rows]
    assert sorted(needs, key=str) == sorted(offline.needs(TARGET, ["bfloat16"], [64]), key=str)
    assert all(each.spill_bytes == 0 and each.config.block_m * each.config.block_n <= 4096 for each in made.rows)
    assert not sweep.journal_of(path).exists()


@pytest.mark.parametrize("shares", [(1.0, 0.6), (1.0, 0.4), (0.0, 0.0)])
def test_the_order_ahead_is_taken_where_it_hides_exponentials_in_every_call(shares: tuple[float, float]) -> None:
    def hides(target: str, kernel: str, variant: Variant, config: Config, listing: bool = False) -> Report:
        loops = (Loop(100, {"wgmma": 1}, shares[variant.causal]),) if listing else ()
        return compile(target, kernel, variant, config)._replace(loops=loops)

    for causal in (None, False):
        found = offline.choose("cuda:90", offline.Need("forward", "bfloat16", 128, False, causal), hides)
        assert found is not None and found.causal is causal
        assert found.config.ahead == ((shares[0] if causal is False else min(shares)) >= offline.HIDDEN)
    for kernel, dtype in (("dq", "bfloat16"), ("forward", "float32")):
        found = offline.choose("cuda:90", offline.Need(kernel, dtype, 64, None), hides)
        assert found is not None and not found.config.ahead


def test_a_row_stays_what_it_is_while_it_is_as_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = row(64, ms=0.0)._replace(config=Config(16, 16, 1, 7))
    monkeypatch.setattr(offline, "shipped_table", lambda target: table(kept))
    wanted = [offline.Need(*kept[:5])]
    made = offline.build_table(TARGET, wanted, compile, Journal(tmp_path / "journal"), "3.7.1")
    assert [each.config for each in made.rows] == [kept.config]


def test_least_spilling_config_is_taken_where_all_spill() -> None:
    def spills(target: str, kernel: str, variant: Variant, config: Config) -> Report:
        return compile(target, kernel, variant, config)._replace(spill_bytes=config.block_m, shared=1)

    found = offline.choose(TARGET, offline.Need("forward", "float64", 512, None), spills)
    tried = list(offline.candidates(TARGET, "forward", "float64", 512))[: offline.TRIES]
    assert found is not None and found.spill_bytes == found.config.block_m == min(c.block_m for c in tried)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", tables.KERNELS)
def test_wrong_kernel_is_found_before_the_clock_starts(
    kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "interpreter" if device.type == "cpu" else "cuda:90"
    job = Job(target, kernel, "float32", 16, False, True, 64, Config(16, 16, 4, 1))
    assert measure.check(job, device) is None
    right = measure.outputs

    def off(*args: Any) -> dict[str, torch.Tensor]:
        return {name: x * 1.0001 for name, x in right(*args).items()}

    monkeypatch.setattr(measure, "outputs", off)
    assert "rms error" in str(measure.check(job, device))


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", tables.KERNELS)
def test_clock_times_the_kernel_of_the_job(kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TOKENS", 64)
    monkeypatch.setattr(measure, "WIDTH", 32)
    found: list[Any] = []

    def clock(call: Callable[[], Any]) -> tuple[float, float, float]:
        found.append(call())
        return 2.0 / len(found), 1.5 / len(found), 2.5 / len(found)

    target = "interpreter" if device.type == "cpu" else "cuda:90"
    job = Job(target, kernel, "float32", 16, False, False, 32, Config(16, 16, 4, 1))
    assert measure.time(job, device, clock) == ((1.0, 0.5, 1.5) if kernel == "dkdv" else (2.0, 1.5, 2.5))
    shapes = [[None if x is None else tuple(x.shape) for x in each] for each in found]
    whole = (2, 2, 32, 16)
    expected = {"forward": [whole, whole[:3]], "dkdv": [None, whole, whole], "dq": [whole, None, None]}
    assert shapes[0] == expected[kernel] + [None] * (len(shapes[0]) - len(expected[kernel]))
    assert shapes[1:] == ([[None] * 6] if kernel == "dkdv" else [])


MADE_UP = {"forward_kernel": 1.0, "delta_kernel": 0.25, "dkdv_kernel": 4.0, "dq_kernel": 2.0}  # ms of a launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the plain kernels that are launched; none of them runs."""
    from flash.kernels import backward, forward

    names: list[str] = []
    monkeypatch.setattr(measure, "TOKENS", 64)
    for module in (forward, backward):
        monkeypatch.setattr(module, "launch", lambda kernel, *args: names.append(kernel.fn.__name__))
    return names


def test_times_of_dkdv_and_dq_add_up_to_one_backward_pass(launched: list[str]) -> None:
    def clock(call: Callable[[], Any]) -> tuple[float, float, float]:
        launched.clear()
        call()
        ms = sum(MADE_UP[name] for name in launched)
        return ms, ms, ms

    def took(kernel: str) -> float:
        job = Job("cuda:90", kernel, "bfloat16", 64, False, True, 64, Config(64, 64, 4, 2))
        return measure.time(job, torch.device("cpu"), clock)[0]

    assert took("dkdv") == MADE_UP["dkdv_kernel"]
    assert took("forward") + took("dkdv") + took("dq") == sum(MADE_UP.values())  # delta's once


def test_a_clock_too_coarse_for_dkdv_gives_no_time(launched: list[str]) -> None:
    job = Job("cuda:90", "dkdv", "bfloat16", 64, False, True, 64, Config(64, 64, 4, 2))
    with pytest.raises(ArithmeticError, match="delta takes 1 ms alone"):
        measure.time(job, torch.device("cpu"), lambda call: (1.0, 1.0, 1.0))


@pytest.mark.parametrize("field", ["gpu", "triton", "kernels"])
def test_timings_of_another_gpu_or_of_other_kernels_are_not_kept(tmp_path: Path, field: str) -> None:
    path = tmp_path / "cuda_90.json"
    first = table(row(16, ms=1.0), row(32))._replace(gpu="A", triton="3.6.0", kernels="0" * 16)
    store.save(path, first)
    other = {"gpu": "B", "triton": "3.7.1", "kernels": "1" * 16}[field]
    store.save(path, first._replace(rows=(row(64, ms=2.0),), **{field: other}))
    found = tables.load(path, {"target": first.target})
    assert found is not None
    assert {each.head_dim for each in found.rows} == {32, 64}  # untimed rows only say what fits
    assert getattr(found, field) == other


def test_rows_chosen_by_compiling_join_those_that_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "cuda_90.json"
    store.save(path, table(row(16, ms=1.0)))
    store.save(path, table(row(64))._replace(gpu="", kernels=""))
    found = tables.load(path, {"target": TARGET, "gpu": GPU, "kernels": tables.kernel_hash()})
    assert found is not None and found.timed
    assert {each.head_dim for each in found.rows} == {16, 64}
