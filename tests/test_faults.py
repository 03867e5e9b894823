"""What goes wrong around the tools, and what becomes of it: kills, full disks, hostile files, GPUs that go away."""

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import run
from flash import dispatch
from flash.attention import flash_attention
from flash.autotune import store, sweep, tables, worker
from flash.autotune.measure import Job
from flash.kernels.spec import LIMITS, Config, check_limits
from tests import kills
from tests.bounds import check, differentiate
from tests.calls import Place, random_inputs
from tests.kills import SMALL, Stand, pretend
from tests.test_sweep import GPU, fast_when_small, read, row, table
from tests.test_tables import HOSTILE, folder, forget, fresh, look

__all__ = ["folder", "fresh"]  # fixtures
ROOT = Path(__file__).parents[1]


def killed(what: str, path: Path) -> Any:
    """What `python -m tests.kills` finds."""
    command = [sys.executable, "-m", "tests.kills", what, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def unchanged(ends: list[dict[str, Any]]) -> bool:
    """Whether all sweeps that were run again ended in the table of one that was never killed, and left nothing else."""
    return all((end["code"], end["same"], end["left"]) == (0, True, []) for end in ends)


# Kills


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_random_points_ends_in_the_same_table(tmp_path: Path) -> None:
    ends = killed("points", tmp_path)
    assert len(ends) == 20 and unchanged(ends)
    assert len({end["kept"] for end in ends}) > 5, "the points lie close together"


@pytest.mark.slow
def test_a_sweep_killed_between_any_two_steps_with_files_ends_in_the_same_table(tmp_path: Path) -> None:
    ends = killed("steps", tmp_path)
    assert len(ends) == 16 and unchanged(ends)
    assert ends[0]["kept"] == 0 and ends[-1]["kept"] > 0


@pytest.mark.slow
def test_sixty_kills_of_sweeps_at_once_corrupt_nothing_and_lose_no_entry(tmp_path: Path) -> None:
    found = killed("crowd", tmp_path)
    assert found["killed"] >= 60 and found["finished"] > 10
    assert {name: found[name] for name in ("corrupt", "lost", "failed", "left")} == {
        "corrupt": 0, "lost": 0, "failed": 0, "left": [],
    }  # fmt: skip


# Files that are not what they should be


def drawn_value(dice: random.Random) -> Any:
    """Something that a field may hold or may not."""
    sound = [
        "forward", "dkdv", "dq", "hopper_forward", "bfloat16", "float32", 16, 32, 64, 128, 256, 1, 2, 4, None, True,
    ]  # fmt: skip
    hostile = [
        "", "../../x", "\u001b[2J", "\ud800", "\0", "a" * 300, -1, 0, 3, 17, 48, 2**31, 10**30, 1e999, -1e999, 0.5, [],
        {}, float("nan"), [[1]], {"a": 1}, "64", 64.0, False,
    ]  # fmt: skip
    return dice.choice(sound if dice.random() < 0.6 else hostile)


def hostile_table(dice: random.Random, key: dict[str, str]) -> bytes:
    """A table that is damaged, foreign or a lie; some of them happen to be sound."""
    fields = (*tables.Row._fields[:6], *Config._fields, *tables.Row._fields[7:])
    sound = table(row(64, ms=1.0), row(128, kernel="dq"), row(16, dtype="float32", causal=True))
    data = json.loads(tables.dump(sound)) | key
    kind = dice.randrange(7)
    if kind == 0:
        return bytes(dice.randrange(256) for _ in range(dice.randrange(200)))
    if kind == 1:
        return dice.choice([b"[", b'{"rows":', b"\0", b"9", b'"\\ud800', b"-"]) * dice.randrange(1, 3000)
    if kind == 2:
        data[dice.choice([*data, "format", "more"])] = drawn_value(dice)
    elif kind == 3:
        data["rows"] = [{field: drawn_value(dice) for field in fields} for _ in range(dice.randrange(3))]
    elif kind == 4:
        for _ in range(dice.randrange(1, 3)):
            data["rows"][dice.randrange(3)][dice.choice(fields)] = drawn_value(dice)
    text = json.dumps(data).encode(dice.choice(["utf-8"] * 6 + ["utf-16"]))
    if kind == 5:
        return text[: dice.randrange(len(text))]
    if kind == 6:
        damaged = bytearray(text)
        for _ in range(dice.randrange(1, 5)):
            damaged[dice.randrange(len(text))] = dice.randrange(256)
        return bytes(damaged)
    return text


@pytest.mark.slow
def test_a_thousand_hostile_tables_of_tiles(folder: Path) -> None:
    path = folder / tables.user_table_name("cuda:90", GPU)
    key = {"target": "cuda:90", "gpu": GPU, "triton": "3.7.1", "kernels": tables.kernel_hash()}
    dice, without, taken = random.Random(0), look(), 0
    for _ in range(1000):
        path.write_bytes(hostile_table(dice, key))
        path.chmod(0o600)
        forget()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            calls = [
                look(gpu=GPU, kernel=kernel, causal=causal) for kernel in tables.KERNELS for causal in (False, True)
            ]
        found = tables.user_table("cuda:90", GPU)
        assert said(seen) == ["ignoring the table"] * (found is None)
        for kernel, choice in zip([k for k in tables.KERNELS for _ in range(2)], calls, strict=True):
            check_limits(kernel, choice.config)
        if found is None:
            assert calls[0] == without
            continue
        taken += 1
        for each in found.rows:
            check_limits(each.kernel, each.config)
            assert each.dtype in tables.ITEMSIZE and each.head_dim in tables.HEAD_DIMS and each.ms >= 0
    assert 50 < taken < 600


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted calls take the tiles of a GPU's tables."""
    monkeypatch.setattr(dispatch, "target_of", lambda device: "cuda:90")
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: GPU)


def said(seen: list[warnings.WarningMessage]) -> list[str]:
    """What was warned of, interpreted kernels' arithmetic aside."""
    words = [" ".join(str(each.message).split()[:3]) for each in seen]
    return [each for each in words if each not in ("divide by zero", "invalid value encountered")]


def attend(*tensors: torch.Tensor, **options: Any) -> Any:
    return flash_attention(*tensors, backend="triton", return_lse=True, **options)


def drawn_config(dice: random.Random, kernel: str) -> Config:
    return Config(**{field: dice.choice(allowed) for field, allowed in LIMITS[kernel].items()})


@pytest.mark.interpret(gpu=False)
@pytest.mark.sampled(8)
@pytest.mark.parametrize("seed", range(32))
def test_any_table_that_is_read_gives_right_results_or_is_refused(
    seed: int, place: Place, folder: Path, on_a_gpu: None
) -> None:
    dice = random.Random(seed)
    path = folder / tables.user_table_name("cuda:90", GPU)
    chosen = {kernel: drawn_config(dice, kernel) for kernel in tables.KERNELS}
    rows = [row(32, kernel=kernel, dtype="float32", config=config, ms=1.0) for kernel, config in chosen.items()]
    store.save(path, table(*rows)._replace(triton="3.7.1"))
    features: dict[str, Any] = dice.choice(
        [{}, {"causal": True}, {"causal": True, "window": (20, 0)}, {"softcap": 5.0}]
    )
    x = random_inputs(place, heads_k=1, seqlen_q=70, seqlen_k=83, head_dim=24, head_dim_v=32, **features)
    assert dispatch.info(x.q, x.k, x.v, backend="triton")["configs"]["dq"]["config"] == chosen["dq"]
    check(differentiate(attend, x), x)
    for kernel in tables.KERNELS:
        damaged = chosen[kernel]._replace(
            **{dice.choice(Config._fields[:4]): dice.choice([0, -16, 9, 10**9, "16", None])}
        )
        with pytest.raises(ValueError, match="must be one of"):
            tables.parse(tables.dump(table(row(32, kernel=kernel, config=damaged))).encode())


@pytest.mark.interpret(gpu=False)
@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["deep", "text", "zeros", "pipe", "folder", "gigabyte", "link to nothing"])
def test_attention_beside_a_hostile_table_is_what_it_is_without(
    name: str, place: Place, folder: Path, on_a_gpu: None
) -> None:
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=20, head_dim=16)
    before = differentiate(attend, x)
    forget()
    path = folder / tables.user_table_name("cuda:90", GPU)
    made: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link to nothing": lambda: path.symlink_to(folder / "nothing"),
    }
    made.get(name, lambda: path.write_bytes(HOSTILE.get(name, b"")))()
    if name == "gigabyte":
        os.truncate(path, 2**30)
        tracemalloc.start()
        with pytest.warns(RuntimeWarning, match="ignoring the table"):
            look(gpu=GPU)
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()
        forget()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        after = differentiate(attend, x)
    assert said(seen) == ["ignoring the table"]
    assert all(torch.equal(old, new) for old, new in zip(before[:5], after[:5], strict=True))


# GPUs that go away, or were never there


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, (out, err)
    return err


def test_a_gpu_that_is_gone_ends_the_sweep_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pretend(monkeypatch, tmp_path / "whole")
    assert sweep.main(SMALL) == 0
    whole, told = path.read_bytes(), capsys.readouterr().out
    jobs: list[Job] = []

    def gone(job: Job) -> Any:
        jobs.append(job)
        broken = {"status": "crash" if len(jobs) % 2 else "timeout", "note": "CUDA error: device lost\nand more"}
        return broken if len(jobs) > 20 else fast_when_small(job)

    path = pretend(monkeypatch, tmp_path / "gone", Stand(gone))
    assert sweep.main(SMALL) == 3
    words = one_line(capsys)
    assert str(jobs[-1]) in words and "start again" in words and len(jobs) == 23
    assert len(read(path).rows) == 2 and set(read(path).rows) < set(tables.parse(whole).rows)
    path = pretend(monkeypatch, tmp_path / "gone")
    assert sweep.main(SMALL) == 0
    assert path.read_bytes() == whole
    assert capsys.readouterr().out.replace("/gone/", "/whole/") == told, "what was lost with the GPU was tried again"


def test_candidates_that_crash_one_after_another_on_a_gpu_that_answers_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crashes(job: Job) -> Any:
        return {"status": "crash", "note": ""} if job.kernel == "dkdv" else fast_when_small(job)

    path = pretend(monkeypatch, tmp_path, Stand(crashes))
    monkeypatch.setattr(sweep, "answers", lambda: True)
    assert sweep.main(SMALL) == 0
    assert {each.kernel for each in read(path).rows} == {"forward", "dq"}
    assert "16 crash, 32 ok" in capsys.readouterr().out


@pytest.mark.parametrize("runner", [sweep.RUNNER, sweep.COMPILER])
def test_a_process_that_does_not_start_ends_the_sweep_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runner: str
) -> None:
    def absent(*job: Any, **options: Any) -> Any:
        raise worker.NotStarted("the process did not start in 120 s")

    stand = Stand(absent) if runner == sweep.RUNNER else Stand(compiled=absent)
    path = pretend(monkeypatch, tmp_path, stand)
    assert sweep.main(SMALL) == 3
    words = one_line(capsys)
    assert "did not start" in words and "the last candidate was" in words and "Config(" in words
    assert not path.exists()


def test_what_a_sweep_says_at_last_stands_in_a_line_of_its_own_below_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    shown = sweep.bar
    pretend(monkeypatch, tmp_path, Stand(lambda job: {"status": "crash", "note": ""}))
    monkeypatch.setattr(sweep, "bar", shown)
    assert sweep.main(SMALL) == 3
    assert capsys.readouterr().err.rpartition("\n")[0].split("\n")[-1].startswith("stopped: 3 candidates in a row")


@pytest.mark.slow
def test_no_gpu_answers_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert not sweep.answers()


SUITES = ("auto", "cpu", "sweep", "models", "all", "quick", "features", "long", "speed", "decode", "overhead", "scale")


def test_tools_that_need_a_gpu_say_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep.main([]) == 4
    assert "no GPU here" in one_line(capsys)
    for suite in SUITES:
        assert run.main(["--suite", suite, "--device", "cuda", "--out", str(tmp_path / "out")]) == 4
        assert "no GPU here" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert dispatch.info()["backend"] == "torch" and "shipped table" in look().reason


def test_a_gpu_that_cannot_be_used_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken() -> str:
        raise RuntimeError("CUDA error: system not yet initialized\nCUDA kernel errors might be reported later")

    pretend(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert sweep.main(SMALL) == 4
    assert "not yet initialized" in one_line(capsys)


# Disks


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: Python ignores the signal, and writing fails."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_device(folder: Path) -> Iterator[None]:
    """Drafts of tables lie on a device that is full."""

    def draft(**options: Any) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(folder / "draft.tmp")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", draft)
        yield


FULL: dict[str, Callable[[Path], Any]] = {"limit": lambda folder: small_files(400), "device": full_device}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", FULL)
def test_a_full_disk_leaves_the_old_table_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = pretend(monkeypatch, tmp_path)
    assert sweep.main([*SMALL[:-1], "4096"]) == 0
    old = path.read_bytes()
    capsys.readouterr()
    with FULL[how](tmp_path), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert sweep.main(SMALL) == 5
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and f"cannot write {path}" in err
    assert len(tables.parse(out.encode()).rows) == kills.ROWS, "what was found is on the screen"
    assert said(seen) == ["cannot write the"] * (how == "limit")  # its journal
    assert path.read_bytes() == old and not list(tmp_path.glob("*.tmp"))
    assert sweep.main(SMALL) == 0
    assert len(read(path).rows) == 2 * kills.ROWS


def refuse(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.EROFS, "Read-only file system")


UNWRITABLE: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "a file in the folder's place": lambda folder, patch: folder.write_text(""),
    "a file in its parent's place": lambda folder, patch: folder.parent.rmdir() or folder.parent.write_text(""),  # type: ignore[func-returns-value]
    "a read-only file system": lambda folder, patch: patch.setattr(Path, "mkdir", refuse),
    "a folder of others": lambda folder, patch: (folder.mkdir(), folder.chmod(0o777)),
    "a link": lambda folder, patch: folder.symlink_to(folder.parent),
    "a folder in the table's place": lambda folder, patch: (folder / tables.user_table_name("cuda:80", GPU)).mkdir(
        0o700, parents=True
    ),
}


@pytest.mark.interpret(gpu=False)
@pytest.mark.sampled(4)
@pytest.mark.parametrize("how", UNWRITABLE)
def test_a_read_only_home_or_cache_leaves_results_as_they_are(
    how: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=20, head_dim=16)
    before = differentiate(attend, x)
    cache = tmp_path / "home" / "cache"
    cache.parent.mkdir(0o700)
    pretend(monkeypatch, cache)
    monkeypatch.setattr(dispatch, "target_of", lambda device: kills.TARGET)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: GPU)
    UNWRITABLE[how](cache, monkeypatch)
    forget()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        after = differentiate(attend, x)
    assert all(torch.equal(old, new) for old, new in zip(before[:5], after[:5], strict=True))
    assert said(seen) in ([], ["ignoring the table"])
    capsys.readouterr()
    assert sweep.main(SMALL) == 5
    assert "cannot write" in one_line(capsys)


NOBODY = 65534
AT_HOME = """
import os, sys, tempfile
from pathlib import Path
import numpy, pytest, torch
from flash import dispatch, info, reference
from flash.attention import flash_attention
from flash.autotune import sweep, tables
from tests.kills import GPU, SMALL, pretend
from tests.test_tables import forget

numpy.seterr(all="ignore")  # of interpreted kernels
dispatch.target_of, dispatch.gpu_of = (lambda device: "cuda:80"), (lambda device: GPU)

def live(folder):
    q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
    o = flash_attention(q, k, v, backend="triton")
    assert torch.allclose(o, reference.attention(q, k, v).float(), atol=1e-5)
    o.sum().backward()
    info(q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, folder)
        return sweep.main(SMALL)

folder = tables.user_folder()
assert folder.is_relative_to(os.environ["HOME"])
with tempfile.TemporaryDirectory() as elsewhere:  # what is imported late is imported by a user who may
    assert live(Path(elsewhere)) == 0
forget()
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
print("at home", flush=True)
raise SystemExit(live(folder))
""".replace("NOBODY", str(NOBODY))


@pytest.mark.slow
@pytest.mark.interpret(gpu=False)
def test_a_home_that_this_user_may_not_write_to_costs_one_line(tmp_path: Path) -> None:
    """The folder is not writable for real; permissions do not bind root, who becomes nobody."""
    tmp_path.chmod(0o500 if os.getuid() else 0o755)
    for each in tmp_path.parents if not os.getuid() else ():
        if each.name.startswith(("pytest-", "popen-")):  # pytest's own, and xdist's
            each.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path), "TRITON_INTERPRET": "1"}
    environment.pop("TRITON_CACHE_DIR", None)
    command = [sys.executable, "-c", AT_HOME]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5, done.stderr
    assert done.stdout.partition("at home\n")[2] == "" and "cannot write" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
