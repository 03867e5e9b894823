"""What is built and shipped: the sdist, the wheel made from it, the pins; and a checkout whose links are gone."""

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flash._checkout import LINKS, MEND, require_links
from flash._version import __version__
from tests.builds import ROOT, Built, build, built, copy_checkout, differences, sha256

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def python_files(folder: Path) -> set[str]:
    """Paths of the Python files and tables below a folder, links followed as a build follows them."""
    found = {path for path in folder.rglob("*") if path.suffix in (".py", ".json")}
    for name in LINKS:
        found |= {path for path in (folder / name).rglob("*") if path.suffix in (".py", ".json")}
    return {path.relative_to(folder.parent).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(tmp_path_factory.mktemp("built"))


def test_sdist_carries_what_it_takes_to_build_test_and_read(made: Built) -> None:
    sdist = made.sdist
    files = (
        "LICENSE",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "constraints.txt",
        "hatch_build.py",
        "constraints-integrations.txt",
    )
    assert [name for name in files if not (sdist / name).is_file()] == []
    folders = ("bench", "examples", "flash/kernels", "flash/autotune/tables", "tests/interpreter")
    assert [name for name in folders if not list((sdist / name).glob("*"))] == []
    assert not [path for path in sdist.rglob("*") if path.is_symlink()]


def test_wheel_is_pure_and_holds_what_is_listed_and_nothing_else(made: Built) -> None:
    with zipfile.ZipFile(made.wheel) as archive:
        about = email.message_from_bytes(archive.read(f"flash_triton-{__version__}.dist-info/WHEEL"))
        for name in archive.namelist():
            archive.read(name).decode("utf-8")  # text, and nothing compiled
    assert (about["Root-Is-Purelib"], about["Tag"]) == ("true", "py3-none-any")
    listing = ROOT / "tests" / "wheel.txt"
    told = "tests/wheel.txt does not list what the wheel holds; where that is meant, change these lines of it:"
    found = differences(made.wheel, listing)
    assert not found, "\n".join([told, *found])
    listed = listing.read_text(encoding="utf-8").splitlines()
    assert listed == sorted(set(listed))


def test_wheel_carries_every_source_and_table(made: Built) -> None:
    expected = python_files(ROOT / "flash")
    assert {"flash/kernels/forward.py", "flash/autotune/tables.py"} <= expected
    assert any(name.startswith("flash/autotune/tables/") for name in expected)
    names = set(zipfile.ZipFile(made.wheel).namelist())
    assert {name for name in names if name.endswith((".py", ".json"))} == expected


def test_two_builds_are_the_same_to_the_byte(made: Built, tmp_path: Path) -> None:
    # the checkout, with links, beside a copy without: of another folder and time, for its owner alone
    copy = tmp_path / "elsewhere"
    shutil.copytree(made.sdist, copy)
    for path in copy.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    umask = os.umask(0o077)
    try:
        for target, first in (("wheel", made.wheel), ("sdist", made.archive)):
            for name, source in (("checkout", ROOT), ("copy", copy)):
                out = tmp_path / f"{target} of the {name}"
                done = build(target, source, out)
                assert done.returncode == 0, done.stderr
                assert sha256(out / first.name) == sha256(first), out.name
    finally:
        os.umask(umask)


def test_wheel_says_what_it_is(made: Built) -> None:
    wheel = made.wheel
    assert wheel.name == f"flash_triton-{__version__}-py3-none-any.whl"
    info = f"flash_triton-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("flash-triton", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    always = {need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})}
    assert always == ({"torch", "triton"} if sys.platform == "linux" else {"torch"})
    triton = next(need for need in needs if need.name == "triton")
    assert triton.marker and not triton.marker.evaluate({"extra": "", "sys_platform": "darwin"})


def break_by_text_file(link: Path) -> None:
    """What git writes without core.symlinks."""
    link.unlink()
    link.write_text(f"../{link.name}")


def break_by_leaving_out(link: Path) -> None:
    """What an archive tool without links leaves."""
    link.unlink()


def break_by_empty_folder(link: Path) -> None:
    """What some archive tools make of a link to a folder."""
    link.unlink()
    link.mkdir()


BREAKS = [break_by_text_file, break_by_leaving_out, break_by_empty_folder]
needs_links = pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="needs links: an sdist has none to break")


@needs_links
@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("damage", BREAKS)
def test_import_of_a_broken_checkout_says_how_to_mend_it(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    damage(checkout / "flash" / name)
    with pytest.raises(ImportError, match=f"^flash/{name} must be a link"):
        require_links(checkout / "flash")
    done = subprocess.run(
        [sys.executable, "-c", "import flash"], cwd=checkout, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert f"ImportError: flash/{name} must be a link" in done.stderr
    assert MEND in done.stderr


@needs_links
@pytest.mark.parametrize("target", ["sdist", "wheel"])
@pytest.mark.parametrize("damage", BREAKS)
def test_broken_checkout_is_never_built(damage: Callable[[Path], None], target: str, tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    for name in LINKS:
        damage(checkout / "flash" / name)
    done = build(target, checkout, tmp_path / "out")
    assert done.returncode != 0
    assert "flash/kernels and flash/autotune must be a link" in done.stderr
    assert MEND in done.stderr
    assert not list(tmp_path.glob("out/*"))


@needs_links
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_mend_with_git_works(tmp_path: Path) -> None:
    origin = copy_checkout(tmp_path / "origin")

    def git(*words: str, cwd: Path = origin) -> None:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "core.autocrlf=false"]
        subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True, timeout=60)

    git("init")
    git("add", "--all")
    git("commit", "-m", "origin")
    checkout = tmp_path / "checkout"
    git("clone", "-c", "core.symlinks=false", str(origin), str(checkout), cwd=tmp_path)
    with pytest.raises(ImportError):
        require_links(checkout / "flash")
    for command in re.findall(r"^ +(git .+)$", MEND, re.MULTILINE):
        subprocess.run(command.split(), cwd=checkout, check=True, timeout=60)
    require_links(checkout / "flash")
    assert (checkout / "flash" / "kernels").is_symlink()


@needs_links
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("damage", BREAKS)
def test_mend_without_git_works(damage: Callable[[Path], None], tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    for name in LINKS:
        damage(checkout / "flash" / name)
    (command,) = re.findall(r"Linux, macOS: +(.+)", MEND)
    subprocess.run(command, shell=True, cwd=checkout, check=True, timeout=60)
    require_links(checkout / "flash")


def constraints() -> dict[str, list[Requirement]]:
    """The pins, by name; a name has several where they differ by Python version."""
    pins: dict[str, list[Requirement]] = {}
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-integrations.txt"))
    for line in "".join(texts).splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name, []).append(pin)
    return pins


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_exactly_one_pin(python_version: str) -> None:
    pins, metadata = constraints(), project()
    groups = [metadata["dependencies"], *metadata["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name == metadata["name"]:  # an extra that is made of others
            continue
        environment = {"python_version": python_version, "sys_platform": "linux"}
        fitting = [p for p in pins[requirement.name] if not p.marker or p.marker.evaluate(environment)]
        assert len(fitting) == 1, requirement.name
        (pin,) = fitting[0].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement.name


def test_development_set_is_the_agreed_one() -> None:
    pins = constraints()
    assert str(pins["torch"][0].specifier) == "==2.13.0"
    assert str(pins["triton"][0].specifier) == "==3.7.1"


def test_torch_can_be_asked_for_first_and_alone() -> None:
    # Makefile and .ci/run take the line as it stands
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("torch")] == ["torch==2.13.0"]


def test_pre_commit_runs_the_pinned_ruff() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==[\d.]+", text)) == {str(constraints()["ruff"][0])}


def test_version_is_said_once_and_has_a_changelog_entry() -> None:
    assert runpy.run_path(str(ROOT / "flash" / "_version.py"))["__version__"] == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "version" not in project()
