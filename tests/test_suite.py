"""What is true of the suite itself: what it leaves out says why, and is left out for that reason."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from tests.mutation.run import LEAST, SOURCES
from tests.test_layout import ROOT, tree

# What a reason may say that is needed: what the condition beside it must then ask for.
NEEDS = {
    r"/proc": r"linux|/proc|descriptors",
    r"/dev/full": r"/dev/full",
    r"\bPOSIX\b": r"win32|getuid",
    r"\bH200\b": r"\bRUNS\b",
    r"\blinks\b": r"PKG-INFO",
    r"\bC\+\+": r"which\(",
    r"\bgit\b": r"which\('git'\)",
    r"\bmake\b": r"which\('make'\)",
    r"\bGPU": r"cuda|ran_on_a_gpu",
    r"\bPython \{": r"\bis None\b",
    r"\bbackend that serves\b": r"NotImplementedError",
    r"\bTriton and TRITON_INTERPRET=1\b": r"_interpreted\(\)",
    r"\bwithout TRITON_INTERPRET\b": r"_interpreted\(\)",
    r"`make test-integrations`": r"find_spec\('neuralforecast'\)",
}


class Left(NamedTuple):
    """One place where tests are left out.

    Args:
        place: "file:line".
        how: "skip", "skipif", "importorskip" or "xfail".
        reason: its text, "{}" for what a run puts into it; None where there is none.
        condition: source of what it depends on: a skipif's own, or the nearest if or except around a skip.
    """

    place: str
    how: str
    reason: str | None
    condition: str


def text_of(node: ast.expr | None) -> str | None:
    """A string as it is written, "{...}" for what is put into it; None where it is no text of the file's own."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def left_out(module: ast.Module, name: str) -> Iterator[Left]:
    """Every skip, skipif, importorskip and xfail of a file."""
    parents = {child: node for node in ast.walk(module) for child in ast.iter_child_nodes(node)}

    def condition_of(node: ast.AST) -> str:
        while node in parents:
            node = parents[node]
            if isinstance(node, ast.If):
                return ast.unparse(node.test)
            if isinstance(node, ast.ExceptHandler):
                return ast.unparse(node.type) if node.type is not None else ""
        return ""

    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and node.attr in ("skip", "xfail") and not called(node, parents):
            yield Left(f"{name}:{node.lineno}", node.attr, None, "")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        how, owner = node.func.attr, ast.unparse(node.func.value)
        if how not in ("skip", "skipif", "importorskip", "xfail") or owner not in ("pytest", "pytest.mark"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        reason = given.get("reason", node.args[0] if node.args and how == "skip" else None)
        place = f"{name}:{node.lineno}"
        if how == "skipif":
            yield Left(place, how, text_of(reason), ast.unparse(node.args[0]))
        elif isinstance(reason, ast.Name):
            for text in texts_of(reason.id, module):
                yield Left(f"{name}:{text.lineno}", how, text_of(text), condition_of(text))
        else:
            yield Left(place, how, text_of(reason), condition_of(node))


def texts_of(name: str, module: ast.Module) -> Iterator[ast.expr]:
    """What a name of a file may stand for: what it is set to, what functions that take it first are called with."""
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.args.args]
    takers = {function.name for function in functions if function.args.args[0].arg == name}
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and ast.unparse(node.value) != "None":
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in takers and node.args:
            yield node.args[0]


def called(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether an attribute is the function of a call, or belongs to something else than pytest and its marks."""
    parent = parents.get(node)
    of_pytest = ast.unparse(node.value) in ("pytest", "pytest.mark")
    return not of_pytest or isinstance(parent, ast.Call) and parent.func is node


def wrong(left: Left) -> str | None:
    """What is wrong with a reason, or None."""
    if left.how == "importorskip":
        return None  # pytest says which module could not be imported
    if not left.reason:
        return "says no reason"
    if left.how == "xfail":
        return None
    if not left.reason.startswith("needs "):
        return "does not begin with what it needs"
    rows = [asked for said, asked in NEEDS.items() if re.search(said, left.reason)]
    if not rows:
        return "names nothing that NEEDS knows how to ask for"
    return None if any(re.search(asked, left.condition) for asked in rows) else "is not what its condition asks for"


@cache
def everything_left_out() -> list[Left]:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    return [left for path in paths for left in left_out(tree(path), path.relative_to(ROOT).as_posix())]


def test_every_skip_says_what_it_needs() -> None:
    found = everything_left_out()
    assert {f"{left.place}: {left.reason!r}": told for left in found if (told := wrong(left))} == {}
    assert {"skip", "skipif", "importorskip"} <= {left.how for left in found}
    unused = [said for said in NEEDS if not any(re.search(said, left.reason or "") for left in found)]
    assert not unused, unused


@pytest.mark.parametrize(
    "line, told",
    [
        ("pytest.skip()", "says no reason"),
        ("@pytest.mark.skip\ndef test(): ...", "says no reason"),
        ("@pytest.mark.xfail\ndef test(): ...", "says no reason"),
        ("pytest.skip('flaky')", "does not begin with what it needs"),
        ("pytest.mark.skipif(sys.platform == 'win32', reason='')", "says no reason"),
        ("pytest.mark.skipif(sys.platform == 'win32', reason='needs a GPU')", "is not what its condition asks for"),
        ("pytest.mark.skipif(slow, reason='needs patience')", "names nothing that NEEDS knows how to ask for"),
        ("if machine:\n    pytest.skip('needs a GPU')", "is not what its condition asks for"),
        ("if not torch.cuda.is_available():\n    pytest.skip('needs a GPU')", None),
        ("pytest.importorskip('triton')", None),
    ],
)
def test_a_skip_without_a_true_reason_is_found(line: str, told: str | None) -> None:
    (left,) = left_out(ast.parse(line), "tests/test_x.py")
    assert wrong(left) == told


@pytest.mark.parametrize("path", sorted(path.name for path in ROOT.glob("kernels/*.py")))
def test_coverage_of_the_kernels_is_complete_in_the_committed_run(path: str) -> None:
    report = (ROOT / "tests" / "coverage.txt").read_text(encoding="utf-8")  # `make coverage` writes it
    (share,) = re.findall(rf"^kernels/{re.escape(path)} .* (\d+)%$", report, re.MULTILINE)
    assert share == "100"


def test_mutants_of_every_kernel_are_killed_in_the_committed_run() -> None:
    report = json.loads((ROOT / "tests" / "mutation" / "report.json").read_text(encoding="utf-8"))
    assert report["rate"] >= LEAST and report["survived"] == []
    assert report["killed"] + report["equivalent"] == report["mutants"]
    mutated = {str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern)}
    assert mutated - report["files"].keys() == {"kernels/launch.py", "kernels/spec.py"}  # which hold no device code


def test_twenty_runs_in_a_row_pass_in_the_committed_report() -> None:
    report = json.loads((ROOT / "tests" / "steady.json").read_text(encoding="utf-8"))
    runs = report["runs"][-20:]
    assert len(runs) == 20 and all(run["exit_code"] == 0 for run in runs)
