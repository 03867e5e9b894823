"""What README, CONTRIBUTING and docs/ say: their code runs, their commands are there, their links and names lead
somewhere, and the gallery is what its command draws.

    ```python                    runs as it stands, in a fresh namespace
    ```python needs=onnx         compiles, and runs where that package is installed, among the tests of integrations
    ```python ranks              runs as the only rank of torch.distributed
    ```python prints             runs, and prints the next block
    ```sh                        every command exists and takes the options it is given; nothing is run
    ```text                      what a command prints, or a picture of letters
"""

import argparse
import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import socket
import sys
import typing
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from bench import gallery
from flash import flash_attention, mods, reference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "sh", "text"}
MARKS = {"needs", "prints", "ranks"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line, counted from 1
    language: str
    marks: dict[str, str]
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def packages(self) -> set[str]:
        """What it needs beside this library."""
        return set(filter(None, self.marks.get("needs", "").split(",")))

    @property
    def source(self) -> str:
        """The code, on the lines that it has in the page."""
        return "\n" * (self.line - 1) + self.code


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = text_of(page)
    for found in FENCE.finditer(text):
        language, *words = found[2].split() or [""]
        marks = dict(word.partition("=")[::2] for word in words)
        line = text[: found.start()].count("\n") + 2
        yield Block(page, line, language, marks, found[3])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


OTHERS = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # their packages, and their warnings


def of_language(language: str) -> Any:
    """Blocks, those that need other people's packages marked so."""
    chosen = [
        pytest.param(block, marks=OTHERS if block.packages - {"triton"} else ())
        for block in BLOCKS
        if block.language == language
    ]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.name)


def test_every_block_says_what_it_is() -> None:
    assert len(BLOCKS) > 20
    assert [block.name for block in BLOCKS if block.language not in LANGUAGES] == []
    assert [block.name for block in BLOCKS if not block.marks.keys() <= MARKS] == []
    assert all(text_of(page).count("```") == 2 * len([*blocks_of(page)]) for page in PAGES)
    for block in BLOCKS:
        if block.language == "python":
            compile(block.source, block.page, "exec")


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells the only process it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@of_language("python")
def test_code_block_runs(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a file of its own: Triton reads the source of its functions."""
    for package in block.packages:
        pytest.importorskip(package)
    if "ranks" in block.marks:
        request.getfixturevalue("rank")
    path = tmp_path / f"{block.page.stem.replace('-', '_')}.py"
    path.write_text(block.source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runpy.run_path(str(path), run_name="__main__")
    if "prints" in block.marks:
        printed = BLOCKS[BLOCKS.index(block) + 1]
        assert (printed.page, printed.language) == (block.page, "text")
        assert capsys.readouterr().out == printed.code


class Parsed(Exception):
    """A command line was understood."""


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:  # a setting before the command
        words = words[1:]
    if words:
        CHECKS[words[0]](words[1:], monkeypatch)


@of_language("sh")
def test_command_exists(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in block.code.replace("\\\n", "").splitlines():
        check_command(line, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_within_a_sentence_exists(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in re.findall(r"`((?:python -m|make|pip install) [^`]+)`", prose_of(page)):
        check_command(" ".join(line.split()), monkeypatch)


def check_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = text_of(ROOT / "Makefile")
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert f"$({name})" in makefile if is_variable else re.search(rf"^{name}:", makefile, re.MULTILINE), word


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is there, whose own argparse understands the rest."""
    assert words[0] == "-m", words
    module, *options = words[1:]
    assert importlib.util.find_spec(module) is not None, module
    if module == "pytest" or not options:
        return
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        real(self, options, namespace)
        raise Parsed

    source = Path(str(importlib.util.find_spec(f"{module}.__main__" if module == "flash" else module).origin))
    assert "argparse" in source.read_text(encoding="utf-8"), f"{module} takes no options"
    with monkeypatch.context() as patch, warnings.catch_warnings(), pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *options])
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        runpy.run_module(module, run_name="__main__")


def check_pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] == "install" and len(words) == 2, words
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[1])
    assert asked is not None and set(filter(None, (asked[1] or "").split(","))) <= extras.keys(), words


def check_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    get_args_parser().parse_args(words)


CHECKS = {"make": check_make, "python": check_python, "pip": check_pip, "torchrun": check_torchrun}


def test_a_wrong_command_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        check_make: ["tset", "NOBS=3"],
        check_python: ["-m bench.nun", "-m bench.run --device tpu", "-m flash --verbose"],
        check_pip: ["install .[gpu]", "remove ."],
    }
    for check, lines in wrong.items():
        for line in lines:
            with pytest.raises((AssertionError, SystemExit)):
                check(line.split(), monkeypatch)


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    for link in links:
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_reached_from_the_readme() -> None:
    assert [page.name for page in PAGES[2:] if f"docs/{page.name}" not in text_of(PAGES[0])] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_function_that_is_named_is_there(page: Path) -> None:
    """Named as `kernels/score.py`, `kernels/score.py:capped` or `tests/test_mods.py::test_masks_mean_what_they_say`."""
    for path, name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|json|md))(?::{1,2}(\w+))?`", prose_of(page)):
        if "<" in path or "*" in path:
            continue
        file = ROOT / path
        assert file.is_file(), path
        if name:
            body = [statement for node in ast.parse(text_of(file)).body for statement in (node, *inner(node))]
            assert name in {getattr(statement, "name", None) for statement in body}, f"{path}:{name}"


def inner(node: ast.AST) -> list[ast.AST]:
    """The methods of a class."""
    return list(node.body) if isinstance(node, ast.ClassDef) else []


def test_the_measured_memory_is_that_of_the_report() -> None:
    report = text_of(ROOT / "bench" / "results" / "cpu-2-cores-amd-epyc" / "report.md")
    rows = re.findall(r"^\| \d+ .*\|$", text_of(ROOT / "docs" / "memory.md"), re.MULTILINE)
    measured = [row for row in rows if row.count("|") == 8]
    assert len(measured) >= 8
    assert [row for row in measured if row not in report] == []


# The gallery

FORMS = {"causal", "window", "q_offset", "mask", "bias", "alibi_slopes", "score_mod", "mask_mod", "block_mask"}


def shipped() -> set[str]:
    """The names of the mods that flash.mods makes."""
    makers = {name: getattr(mods, name) for name in mods.__all__ if inspect.isfunction(getattr(mods, name))}
    return {
        name
        for name, make in makers.items()
        if typing.get_type_hints(make).get("return") in (mods.MaskMod, mods.ScoreMod)
    }


def test_gallery_shows_every_mask_and_is_what_its_command_draws(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    drawn = gallery.pictures()
    used = [
        value
        for picture in drawn.values()
        for value in picture.keywords.values()
        if isinstance(value, mods.MaskMod | mods.ScoreMod)
    ]
    assert {mod.torch_fn.__name__.strip("_").removesuffix("_torch") for mod in used} == shipped()
    assert len(shipped()) >= 7
    assert {name for picture in drawn.values() for name in picture.keywords} >= FORMS
    assert inspect.signature(flash_attention).parameters.keys() >= FORMS

    gallery.main(["--output", str(tmp_path)])
    kept = ROOT / "docs" / "gallery"
    assert {path.name for path in kept.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for name in drawn:
        one, other = (image.imread(folder / f"{name}.png") for folder in (kept, tmp_path))
        assert one.shape == other.shape and (one == other).all(), name
        assert (kept / f"{name}.png").stat().st_size < 60_000
        assert f"(gallery/{name}.png)" in text_of(ROOT / "docs" / "masks.md"), name


@pytest.mark.parametrize("name", gallery.pictures())
def test_picture_shows_what_the_oracle_says(name: str) -> None:
    picture = gallery.pictures()[name]
    found = gallery.weights(picture)
    names = set(picture.keywords) - {"max_seqlen_q", "max_seqlen_k"}
    oracle = picture._replace(keywords={key: picture.keywords[key] for key in names})
    want = gallery.weights(oracle, reference.attention, reference.attention_varlen)
    assert torch.equal(found > 0, want > 0)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    assert not (found > 0).logical_and(~gallery.visited(picture)).any()
