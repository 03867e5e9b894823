"""What somebody else might do with the files that are read and the places that are written, and cannot."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.attention import flash_attention
from flash.autotune import owned, store, sweep, tables
from flash.autotune.worker import NotStarted
from flash.mods import MaskMod, ScoreMod, from_handle
from tests.kills import SMALL, TARGET, Stand, pretend
from tests.test_faults import one_line
from tests.test_layout import ROOT, SHIPPED, run, sources, tree
from tests.test_sweep import GPU, fast_when_small, row, table
from tests.test_tables import folder, forget, fresh, look

__all__ = ["folder", "fresh"]  # fixtures

# What runs what a file or a text says, or hands the process to something that is not Python.
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "ctypes", "_ctypes",
    "cffi", "code", "codeop", "runpy", "imp", "pty", "socket", "urllib", "http", "requests",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
NAMES = {
    "os.system", "os.popen", "os.exec*", "os.spawn*", "torch.hub.*", "torch.jit.load", "torch.ops.load_library",
    "torch.utils.cpp_extension.*", "importlib.util.spec_from_file_location", "importlib.machinery.*",
}  # fmt: skip
IMPORTERS = {
    "flash/autotune/worker.py",
    "bench/cold_child.py",
    "bench/peers.py",
    "bench/decode_peers.py",
}  # by names that stand in the source


def dotted(node: ast.AST) -> str:
    """a.b.c of a chain of attributes; "" of anything else."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_parameter(module: ast.Module, call: ast.Call, name: str) -> bool:
    """Whether a call is of a parameter of a function around it."""
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef) and any(node is call for node in ast.walk(function)):
            if name in [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]:
                return True
    return False


def true_keyword(call: ast.Call, name: str) -> bool:
    values = [each.value for each in call.keywords if each.arg == name]
    return any(not (isinstance(value, ast.Constant) and value.value is False) for value in values)


def dangers(module: ast.Module, may_import: bool = False) -> Iterator[tuple[int, str]]:
    """(line, what) of all that could run what a file says."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names if each.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{each.name}" for each in node.names]
            wrong = [name for name in names if name.split(".")[0] in MODULES or any(map(re_of(name), NAMES))]
            yield from ((node.lineno, name) for name in wrong)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BUILTINS and not is_parameter(module, node, name):
                yield node.lineno, name
            if name.endswith("import_module") and not may_import:
                yield node.lineno, name
            if any(map(re_of(name), NAMES)) or true_keyword(node, "shell") or true_keyword(node, "allow_pickle"):
                yield node.lineno, name
            if name == "torch.load" and not true_keyword(node, "weights_only"):
                yield node.lineno, name
        elif isinstance(node, ast.Attribute) and node.attr in ("dlopen", "CDLL", "__globals__", "__subclasses__"):
            yield node.lineno, node.attr


def re_of(name: str) -> Callable[[str], bool]:
    """Whether a pattern of NAMES fits a name."""
    return lambda pattern: bool(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), name))


def test_no_pickle_eval_exec_or_load() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in sources(*SHIPPED, "bench", "examples")
        for line, what in dangers(tree(path), str(path.relative_to(ROOT)) in IMPORTERS)
    ]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import os, ctypes.util", "eval('1')", "exec(text)",
        "compile(a, b, c)", "__import__('os')", "os.system('ls')", "subprocess.run('ls', shell=True)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "from os import system", "os.execv(a, b)",
        "torch.hub.load('a', 'b')",
        "numpy.load(path, allow_pickle=True)", "importlib.import_module(name)", "library.dlopen(path)",
        "import torch.utils.cpp_extension as c\ntorch.utils.cpp_extension.load(name)", "import urllib.request",
    ],
)  # fmt: skip
def test_the_search_finds(text: str) -> None:
    assert list(dangers(ast.parse(text)))


def test_the_search_leaves_alone_what_is_no_danger() -> None:
    text = """
def choose(compile):
    return compile(1), torch.compile(f), model.eval(), re.compile("a"), ast.literal_eval("1")
torch.load(path, weights_only=True)
subprocess.run(["ls"], shell=False)
"""
    assert not list(dangers(ast.parse(text)))


# User functions


def plain_score(s: Any, b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    return s


def plain_mask(b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
    return j <= i


class Spoof:
    """Has what a @triton.jit function has, and is none."""

    fn = staticmethod(plain_mask)


@pytest.mark.parametrize("wrong", ["lambda b, h, i, j, args: j <= i", plain_mask, Spoof(), b"", 1, os.system, eval])
def test_user_functions_are_jit_functions(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"MaskMod.fn must be a @triton.jit function \(b, h, i, j, args\), got"):
        MaskMod(wrong, plain_mask)
    with pytest.raises(TypeError, match=r"ScoreMod.fn must be a @triton.jit function \(s, b, h, i, j, args\), got"):
        ScoreMod(wrong, plain_score, None)
    with pytest.raises(TypeError, match="ScoreMod.derivative must be a @triton.jit function"):
        ScoreMod(None, plain_score, wrong)


@pytest.mark.parametrize("wrong", ["plain", b"", 1])
def test_torch_twins_are_functions(wrong: Any) -> None:
    with pytest.raises(TypeError, match="MaskMod.torch_fn must be a Python function"):
        MaskMod(None, wrong)
    with pytest.raises(TypeError, match="ScoreMod.torch_fn must be a Python function"):
        ScoreMod(None, wrong, None)


@pytest.mark.parametrize("name", ["score_mod", "mask_mod"])
@pytest.mark.parametrize("wrong", ["os.system", plain_mask, Spoof()])
def test_a_call_takes_mods_and_no_functions(name: str, wrong: Any) -> None:
    q = torch.randn(1, 1, 4, 8)
    kind = {"score_mod": "ScoreMod", "mask_mod": "MaskMod"}[name]
    with pytest.raises((TypeError, ValueError), match=f"{name} must be a flash.mods.{kind}"):
        flash_attention(q, q, q, **{name: wrong})


@pytest.mark.parametrize("handle", ["os:system", "plain_mask:0", "", "../x"])
def test_a_name_of_no_mod_of_this_process_leads_to_no_function(handle: str) -> None:
    with pytest.raises(ValueError, match="must name a mod of this process"):
        from_handle(handle, ())


# Files


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(path: Path) -> dict[str, int]:
    return {each.name: each.stat().st_mode & 0o777 for each in (path, *sorted(path.rglob("*")))}


def test_what_is_written_is_private_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_umask: None
) -> None:
    jobs, drafts = [], []

    def stops(job: Any) -> Any:
        jobs.append(job)
        if len(jobs) > 20:
            raise NotStarted("gone")
        return fast_when_small(job)

    def replace(old: Any, new: Any, stock: Any = os.replace) -> None:
        drafts.append(os.stat(old).st_mode & 0o777)
        stock(old, new)

    home = tmp_path / ".triton"
    path = pretend(monkeypatch, home / "flash-triton", Stand(stops))
    monkeypatch.setattr(os, "replace", replace)
    assert sweep.main(SMALL) == 3  # the journal stays
    private = {
        home.name: 0o700, "flash-triton": 0o700, path.name: 0o600, f"{path.name}.lock": 0o600,
        sweep.journal_of(path).name: 0o600,
    }  # fmt: skip
    assert modes(home) == private and drafts == [0o600]
    pretend(monkeypatch, home / "flash-triton")
    assert sweep.main(SMALL) == 0
    del private[sweep.journal_of(path).name]
    assert modes(home) == private


def test_a_table_to_hand_on_is_written_by_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_umask: None
) -> None:
    pretend(monkeypatch, tmp_path / "home")
    path = tmp_path / "out" / "table.json"
    assert sweep.main([*SMALL, "--output", str(path)]) == 0
    assert modes(path.parent) == {"out": 0o700, "table.json": 0o644, "table.json.lock": 0o600}
    assert not (tmp_path / "home").exists()


def others(folder: Path, patch: pytest.MonkeyPatch) -> None:
    user = os.getuid()
    patch.setattr(os, "getuid", lambda: user + 1)


def linked(folder: Path, patch: pytest.MonkeyPatch) -> None:
    real = folder.rename(folder.with_name("real"))
    folder.symlink_to(real)


FOREIGN: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "of another user": others,
    "a link": linked,
    "that a group may write to": lambda folder, patch: folder.chmod(0o770),
    "that all may write to": lambda folder, patch: folder.chmod(0o707),
}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("how", FOREIGN)
def test_a_folder_of_others_is_neither_read_nor_written(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pretend(monkeypatch, tmp_path / "cache")
    assert sweep.main(SMALL) == 0
    there = os.listdir(path.parent)
    capsys.readouterr()
    FOREIGN[how](path.parent, monkeypatch)
    forget()
    with pytest.warns(RuntimeWarning, match="must be a folder of this user, no link, that others cannot write to"):
        assert "timed" not in look(target=TARGET, gpu=GPU, seqlen=1024).reason.replace("untimed", "")
    assert sweep.main(SMALL) == 5
    assert "must be a folder of this user" in one_line(capsys)
    assert sorted(os.listdir(path.parent)) == sorted(there)


def test_a_link_in_the_place_of_the_lock_or_the_journal_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pretend(monkeypatch, tmp_path / "cache")
    path.parent.mkdir(0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = path.with_name(path.name + ".lock")
    lock.symlink_to(victim)
    assert sweep.main(SMALL) == 5
    assert "cannot write" in one_line(capsys)
    lock.unlink()
    sweep.journal_of(path).symlink_to(victim)
    with pytest.warns(RuntimeWarning, match="ignoring the journal"):
        assert sweep.main(SMALL) == 0
    assert victim.read_text() == "precious"


def test_a_link_in_the_place_of_a_lock_makes_no_file_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, tmp_path / "cache")
    output = tmp_path / "table.json"
    (tmp_path / "table.json.lock").symlink_to(tmp_path / "made")
    assert sweep.main([*SMALL, "--output", str(output)]) == 5
    assert "cannot write" in one_line(capsys) and os.listdir(tmp_path) == ["table.json.lock"]


def test_a_journal_that_is_another_file_by_a_second_name_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pretend(monkeypatch, tmp_path / "cache")
    path.parent.mkdir(0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.link(victim, sweep.journal_of(path))
    with pytest.warns(RuntimeWarning, match="it must have no other name"):
        assert sweep.main(SMALL) == 0
    assert victim.read_text() == "precious" and tables.parse(path.read_bytes()).rows


def swap(path: Path, other: Callable[[], Any], patch: pytest.MonkeyPatch) -> None:
    """Just before a file is opened, something else takes its place."""
    stock = os.open

    def open(name: Any, *arguments: Any, **options: Any) -> int:
        if Path(name) == path:
            path.unlink()
            other()
        return stock(name, *arguments, **options)

    patch.setattr(os, "open", open)


@pytest.mark.parametrize("other", ["link", "pipe", "file that all may write to"])
def test_what_takes_the_place_of_a_file_between_a_look_and_its_opening_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    path = folder / tables.user_table_name("cuda:90", GPU)
    store.save(path, table(row(64, ms=1.0))._replace(triton="3.7.1"))
    assert "timed on this machine" in look(gpu=GPU).reason
    moved = folder / "moved.json"
    moved.write_bytes(path.read_bytes())
    forget()

    def open_to_all() -> None:
        path.write_bytes(moved.read_bytes())
        path.chmod(0o666)

    made = {"link": lambda: path.symlink_to(moved), "pipe": lambda: os.mkfifo(path)}
    swap(path, made.get(other, open_to_all), monkeypatch)
    with pytest.warns(RuntimeWarning, match="ignoring the table"):
        assert look(gpu=GPU) == look()


NAMES_OF_GPUS = [
    "../../x",
    "/etc/passwd",
    "a/../../b",
    "\0",
    "\n\u001b[2J",
    "..",
    "",
    "con",
    "\u202e",
    "\ud800",
    "ü" * 50,
]


@pytest.mark.parametrize("gpu", NAMES_OF_GPUS, ids=repr)
def test_the_name_of_a_gpu_leads_out_of_no_folder(folder: Path, gpu: str) -> None:
    name = tables.user_table_name("cuda:90", gpu)
    assert re.fullmatch(r"cuda_90-[A-Za-z0-9._]*-3\.7\.1-[0-9a-f]{16}\.json", name)
    assert (folder / name).resolve().parent == folder.resolve()
    assert look(gpu=gpu) == look()


def test_a_name_that_is_too_long_for_a_file_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "x" * 300)
    assert sweep.main(SMALL) == 5
    assert "File name too long" in one_line(capsys)
    forget()
    with pytest.warns(RuntimeWarning, match="File name too long"):
        assert look(target=TARGET, gpu="x" * 300) == look(target=TARGET)


def test_two_gpus_whose_names_make_one_file_name_do_not_share_their_tables(folder: Path) -> None:
    path = folder / tables.user_table_name("cuda:90", "A/B")
    assert path.name == tables.user_table_name("cuda:90", "A B")
    store.save(path, table(row(64, ms=1.0))._replace(gpu="A/B", triton="3.7.1"))
    assert "timed" in look(gpu="A/B").reason
    with pytest.warns(RuntimeWarning, match="gpu must be 'A B', got 'A/B'"):
        assert look(gpu="A B") == look()


@pytest.mark.slow
def test_info_prints_nothing_that_moves_a_cursor() -> None:
    out = subprocess.run([sys.executable, "-m", "flash"], cwd=ROOT, capture_output=True, timeout=120).stdout
    assert json.loads(out)["version"]
    assert all(byte == 10 or 32 <= byte < 127 for byte in out)


def test_opening_leaves_no_file_open_behind(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc, for what is open")
    (tmp_path / "open").touch(0o666)
    (tmp_path / "open").chmod(0o666)
    before = len(os.listdir(descriptors))
    for path in (tmp_path, tmp_path / "open", tmp_path / "absent"):
        with pytest.raises(OSError):
            owned.opened(path, os.O_RDONLY)
    assert len(os.listdir(descriptors)) == before


# Network and import


@pytest.mark.slow
def test_import_and_calls_open_no_socket() -> None:
    out = run("""
import sys, warnings

def hook(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http", "ftplib", "smtplib"):
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(hook)
import socket
try:
    socket.socket()
except AssertionError:
    print("watched")
import torch
import flash
from flash.attention import flash_attention
from flash.autotune import tables

q, k, v = (torch.randn(1, 2, 33, 16, requires_grad=True) for _ in range(3))
for backend in ("torch", "triton"):
    try:
        flash_attention(q, k, v, causal=True, backend=backend).sum().backward()
    except NotImplementedError as error:
        assert "interpreter" in str(error) or "not installed" in str(error)
flash.info(), flash.info(q)
tables.lookup("cuda:90", "forward", "bfloat16", 64, 1024, False, "NVIDIA H200")
tables.lookup("cuda:89", "dq", "bfloat16", 64, 1024, False)
from flash.integrations import flash_attn, sdpa
print("done")
""")
    assert out.split() == ["watched", "done"]


ADDED = 0.3  # seconds
TRIES = 6
TIMED = """
import time, torch
start = time.process_time()
import flash, flash.attention
print(time.process_time() - start)
"""


@pytest.mark.slow
def test_import_adds_at_most_three_tenths_of_a_second_to_that_of_torch() -> None:
    """In CPU time of fresh processes, so that others on the machine count little; the best of a few."""
    took = []
    while len(took) < TRIES and min(took, default=ADDED + 1) > ADDED:
        took.append(float(run(TIMED)))
    assert min(took) <= ADDED, took
