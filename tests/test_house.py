"""The house keeps its measures: lengths of files and functions, arguments, what is written twice."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def arguments(function: Function) -> list[str]:
    """The names that a caller may give a value; a method's own object is none."""
    given = function.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [arg.arg for arg in (given.vararg, given.kwarg) if arg is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


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
