"""The house keeps its measures: lengths of files and functions, arguments, what is written twice."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from flash import flash_attention
from tests.test_layout import tree

ROOT = Path(__file__).parents[1]
FOLDERS = ("flash", "kernels", "autotune", "bench", "examples", "tests")
SIX = 6  # statements that may not stand twice in a row

# Signatures that others made: architecture's contract for the public calls.
GIVEN = {"flash_attention_varlen", "flash_attention_decode"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> list[Path]:
    """The Python files below the folders; what the links in flash/ lead to is in folders of its own."""
    found = []
    for folder in folders:
        paths = sorted((ROOT / folder).rglob("*.py"))
        found += [
            path
            for path in paths
            if path.relative_to(ROOT).parts[:2] not in (("flash", "kernels"), ("flash", "autotune"))
        ]
    return found


@cache
def functions(path: Path) -> tuple[Function, ...]:
    return tuple(node for node in ast.walk(tree(path)) if isinstance(node, Function))


def arguments(function: Function) -> list[str]:
    """The names that a caller may give a value; a method's own object is none."""
    given = function.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [arg.arg for arg in (given.vararg, given.kwarg) if arg is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def named(path: Path, name: str) -> list[Function]:
    """The functions of a file by a name, "Class.name" of a method."""
    owner, _, own = name.rpartition(".")
    body: list[ast.AST] = [tree(path)]
    if owner:
        body = [node for node in ast.walk(body[0]) if isinstance(node, ast.ClassDef) and node.name == owner]
    return [node for part in body for node in ast.walk(part) if isinstance(node, Function) and node.name == own]


def is_kernel(function: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def place(path: Path, function: Function) -> str:
    return f"{path.relative_to(ROOT)}:{function.name}"


def statements(body: list[ast.stmt]) -> Iterator[str]:
    """The statements of a body in order, those inside others too, without docstrings and imports."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        inner = [field for name in ("body", "orelse", "finalbody") for field in getattr(node, name, [])]
        inner += [line for handler in getattr(node, "handlers", []) for line in handler.body]
        yield ast.unparse(node).partition("\n")[0] if inner else ast.unparse(node)
        if not isinstance(node, Function | ast.ClassDef):
            yield from statements(inner)


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files(*FOLDERS)}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_function_is_longer_than_120_lines() -> None:
    found = {
        place(path, function): length
        for path in files(*FOLDERS)
        for function in functions(path)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > 120
    }
    assert found == {}


def test_no_function_has_more_than_20_arguments() -> None:
    found = {
        place(path, function): len(arguments(function))
        for path in files(*FOLDERS)
        for function in functions(path)
        if len(arguments(function)) > 20 and function.name not in GIVEN
    }
    assert found == {}


def test_no_kernel_has_more_than_14_arguments() -> None:
    kernels = [(path, function) for path in files(*FOLDERS) for function in functions(path) if is_kernel(function)]
    assert len(kernels) > 100
    counts = {place(path, function): len(arguments(function)) for path, function in kernels}
    assert {name: count for name, count in counts.items() if count > 14} == {}


def test_no_block_of_six_lines_stands_twice() -> None:
    runs: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in files(*FOLDERS):
        for function in functions(path):
            lines = list(statements(function.body))
            for at in range(len(lines) - SIX + 1):
                runs[tuple(lines[at : at + SIX])].append(place(path, function))
    assert sorted({" ~ ".join(sorted(where)) for where in runs.values() if len(where) > 1}) == []


@pytest.mark.parametrize("count", [SIX - 1, SIX])
def test_what_is_written_twice_is_found(count: int) -> None:
    lines = [f"x = {n}" for n in range(count)]
    body = ast.parse("def f():\n    'Words.'\n    if y:\n        " + "\n        ".join(lines[1:]) + "\n").body[0]
    assert isinstance(body, ast.FunctionDef)
    assert list(statements(body.body)) == ["if y:", *lines[1:]]


def stack_of(kernel: str) -> list[tuple[str, str]]:
    """(file, function) of ours on the stack when a kernel of a plain call starts, the outermost first."""
    q, k, v = (torch.randn(1, 2, 17, 16, requires_grad=True) for _ in range(3))
    found: list[tuple[str, str]] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name != kernel or found:
            return
        while frame is not None:
            path = Path(frame.f_code.co_filename).resolve()
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("flash", "kernels", "autotune"):
                found.append((str(path.relative_to(ROOT)), frame.f_code.co_name))
            frame = frame.f_back

    torch.autograd.set_multithreading_enabled(False)  # a profiler belongs to its thread
    sys.setprofile(watch)
    try:
        flash_attention(q, k, v, causal=True, backend="triton").sum().backward()
    finally:
        sys.setprofile(None)
        torch.autograd.set_multithreading_enabled(True)
    return found[::-1]


@pytest.mark.interpret(gpu=False)
@pytest.mark.parametrize(("head", "kernel"), [("forward", "forward_kernel"), ("backward", "dq_kernel")])
def test_the_walk_in_contributing_is_the_one_that_a_call_takes(head: str, kernel: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The walk")[2]
    table = text.partition(f"| step | {head} | arguments |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| \d+ \| `(\S+)` `(\S+)` \| (\d+) \|$", table, re.MULTILINE)
    assert [(file, name.rpartition(".")[2]) for file, name, _ in rows] == stack_of(kernel)
    for file, name, count in rows:
        assert [len(arguments(found)) for found in named(ROOT / file, name)] == [int(count)], name
    (files_said, steps_said, widest, last) = re.search(
        rf"^\| here, {head} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE
    ).groups()  # type: ignore[union-attr]
    inner = [int(count) for _, _, count in rows[1:-1]]
    assert (int(files_said), int(steps_said)) == (len({file for file, _, _ in rows}), len(rows))
    assert (int(widest), int(last)) == (max(inner), int(rows[-1][2]))
