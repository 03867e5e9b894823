"""The checklist of a release on small repositories: it passes where all is there, and names each thing that is not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builds import ROOT, built, copy_checkout, differences
from tests.release import git, main, version_of

pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git"),
    pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="needs links: an sdist has none"),
]
PROMISE = "import pytest\n\n\n@pytest.mark.xfail(strict=True, reason='no time')\ndef test_promise(): ...\n"


def commit(root: Path) -> None:
    git(root, "add", "--all")
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "core.autocrlf=false")
    git(root, *identity, "commit", "--quiet", "--allow-empty", "--message", "all of it")


def change(path: Path, old: str, new: str) -> None:
    """Replace what a pattern matches, which must be there."""
    text = path.read_text(encoding="utf-8")
    assert re.search(old, text), old
    path.write_text(re.sub(old, new, text, count=1), encoding="utf-8")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that lacks nothing: the package of this checkout, and little beside it."""
    root = copy_checkout(tmp_path_factory.mktemp("release") / "checkout")
    files = {
        "CHANGELOG.md": f"# All\n\n## {version_of(root)} (2026-12-01)\n\n- Everything.\n- Not reached: the moon.\n",
        ".gitignore": "/dist/\n__pycache__/\n",
        ".ci/run": "#!/bin/sh\n[ -e CHANGELOG.md ] && echo the checks ran\n",
        "tests/test_acceptance.py": "def test_promise():\n    assert True\n",
        "tests/wheel.txt": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / ".ci" / "run").chmod(0o755)
    listing = root / "tests" / "wheel.txt"
    wheel = built(tmp_path_factory.mktemp("first"), root).wheel
    listing.write_text("".join(f"{line[2:]}\n" for line in differences(wheel, listing)), encoding="utf-8")
    git(root, "init", "--quiet")
    commit(root)
    return root


@pytest.fixture
def root(ready: Path, tmp_path: Path) -> Path:
    """That repository, to be damaged."""
    return Path(shutil.copytree(ready, tmp_path / "root", symlinks=True))


def test_a_release_that_lacks_nothing_prints_its_hashes_and_what_to_do(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([], root) == 0
    told, version = capfd.readouterr().out, version_of(root)
    assert "the checks ran" in told
    names = [f"flash_triton-{version}-py3-none-any.whl", f"flash_triton-{version}.tar.gz"]
    assert re.findall(r"^[0-9a-f]{64}  dist/(\S+)$", told, re.MULTILINE) == names
    assert f"git tag --annotate v{version}" in told and "twine upload" in told
    assert git(root, "tag", "--list") == "" and sorted(path.name for path in (root / "dist").iterdir()) == names


def of_another_commit(root: Path) -> None:
    git(root, "tag", f"v{version_of(root)}")
    change(root / "CHANGELOG.md", "Everything", "Everything else")


def reason_that_is_not_told(root: Path) -> None:
    (root / "tests" / "test_acceptance_more.py").write_text(PROMISE)


def that_keeps_times(root: Path) -> None:
    change(root / PROJECT, r"(?=\[tool.hatch.version\])", "[tool.hatch.build]\nreproducible = false\n\n")


CHANGELOG, PROJECT, VERSION = "CHANGELOG.md", "pyproject.toml", "flash/_version.py"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "v0.1.0 is the tag of another commit": of_another_commit,
    "CHANGELOG.md must begin with the entry of 0.1.1": lambda root: change(root / VERSION, r"0\.1\.0", "0.1.1"),
    "CHANGELOG.md must date its entry": lambda root: change(root / CHANGELOG, r" \(2026.+\)", ""),
    "CHANGELOG.md must say what 0.1.0 brings": lambda root: change(root / CHANGELOG, r"(?m)^- [\s\S]+", ""),
    'acceptance_more.py:4 does not hold, and CHANGELOG.md has no "Not reached: no time"': reason_that_is_not_told,
    "tests/wheel.txt lists, got + flash/more.py": lambda root: (root / "flash/more.py").write_text("MORE = 1\n"),
    "must be built alike in a clone": that_keeps_times,
    "pyproject.toml must give a description and a readme": lambda root: change(root / PROJECT, "readme = .+\n", ""),
    ".ci/run must pass": lambda root: change(root / ".ci/run", "-e CHANGELOG.md", "-e nowhere"),
}  # fmt: skip


DEAR = ("must be built alike in a clone", "pyproject.toml must give a description and a readme", ".ci/run must pass")


@pytest.mark.parametrize(
    "told", [pytest.param(told, marks=pytest.mark.slow if told in DEAR else ()) for told in DAMAGE]
)
def test_a_release_is_refused_while_something_is_missing(
    told: str, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[told](root)
    commit(root)
    assert main([], root) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert lines and all(told in line for line in lines), lines


def test_a_release_is_refused_with_changes_that_are_not_committed(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (root / "flash" / "more.py").write_text("MORE = 1\n")
    assert main([], root) == 1
    assert capfd.readouterr().out == "missing: the tree must be clean, got 1 changes: git status\n"


@pytest.mark.slow
def test_a_promise_whose_reason_is_told_does_not_stop_a_release(root: Path) -> None:
    (root / "tests" / "test_acceptance_more.py").write_text(PROMISE.replace("no time", "the moon"))
    change(root / ".ci/run", "-e CHANGELOG.md", "-e nowhere")  # not asked where it has passed before
    commit(root)
    assert main(["--checked"], root) == 0


def test_a_release_of_no_commit_is_refused(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / ".git")
    assert main(["--checked"], root) == 1
    assert "a git checkout is needed" in capfd.readouterr().out
