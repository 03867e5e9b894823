"""The checklist of a release, as a command: says what is missing, or prints what to do next. It publishes nothing.

    make release                     everything; .ci/run takes about an hour
    make release RELEASE=--checked   all but .ci/run, which has passed on this commit

Exit code 1, and one line for each thing that is missing; else 0, the artifacts in dist/ with their SHA-256, and the
commands that tag and upload them.
"""

import argparse
import ast
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.metadata import Metadata

from tests.builds import ROOT, Built, built, differences, sha256
from tests.test_suite import left_out


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def version_of(root: Path) -> str:
    return str(runpy.run_path(str(root / "flash" / "_version.py"))["__version__"])


def entry(root: Path, version: str) -> tuple[str, str]:
    """The heading of a version in the changelog, and what stands under it; empty where it is not the first one."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## (.+)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE)
    return (found[1], found[2]) if found and re.match(rf"{re.escape(version)}(?!\S)", found[1]) else ("", "")


def missing_in_history(root: Path, version: str) -> Iterator[str]:
    """What git has against it: changes that are not committed, or another commit of this version."""
    if not (root / ".git").exists():
        yield "a git checkout is needed, as what is released is a commit"
        return
    if changed := git(root, "status", "--porcelain"):
        yield f"the tree must be clean, got {len(changed.splitlines())} changes: git status"
    tag, head = f"v{version}", git(root, "rev-parse", "HEAD")
    if git(root, "tag", "--list", tag) and git(root, "rev-parse", f"{tag}^{{commit}}") != head:
        yield f"{tag} is the tag of another commit: raise __version__ in flash/_version.py"


def missing_in_changelog(root: Path, version: str) -> Iterator[str]:
    """What a reader of the changelog would miss: the version on top, its date, something that it says."""
    heading, text = entry(root, version)
    if not heading:
        yield f"CHANGELOG.md must begin with the entry of {version}"
    elif not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d{{2}}-\d{{2}}\)", heading):
        yield f"CHANGELOG.md must date its entry, ## {version} (YYYY-MM-DD), got ## {heading}"
    elif not re.search(r"^- ", text, re.MULTILINE):
        yield f"CHANGELOG.md must say what {version} brings, got an empty entry"


def missing_promises(root: Path, version: str) -> Iterator[str]:
    """Promises that do not hold, as the acceptance tests say, unless the changelog tells why: "Not reached: reason"."""
    told = " ".join(entry(root, version)[1].split())
    for path in sorted((root / "tests").glob("test_acceptance*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for left in left_out(module, path.relative_to(root).as_posix()):
            if left.how == "xfail" and (left.reason is None or f"Not reached: {left.reason}" not in told):
                yield f'{left.place} does not hold, and CHANGELOG.md has no "Not reached: {left.reason}"'


def missing_in_builds(root: Path, first: Built, second: Built) -> Iterator[str]:
    """What is wrong with what was built of the checkout and of a clone."""
    for one, other in ((first.archive, second.archive), (first.wheel, second.wheel)):
        if sha256(one) != sha256(other):
            yield f"{one.name} must be built alike in a clone, to the byte, got {sha256(one)} and {sha256(other)}"
    if found := differences(first.wheel, root / "tests" / "wheel.txt"):
        yield f"{first.wheel.name} must hold what tests/wheel.txt lists, got {'; '.join(found)}"
    yield from missing_in_metadata(first)


def missing_in_metadata(build: Built) -> Iterator[str]:
    """What an index would refuse, or show nothing of."""
    with zipfile.ZipFile(build.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(name))  # valid, or an ExceptionGroup; hatchling knows classifiers
    if not (metadata.summary and metadata.description and metadata.description_content_type == "text/markdown"):
        yield "pyproject.toml must give a description and a readme of Markdown"


def missing(root: Path, checked: bool) -> list[str]:
    """All that is missing; the dear checks come last, and only where nothing is missing before. Fills dist/."""
    version = version_of(root)
    checks = (missing_in_history, missing_in_changelog, missing_promises)
    if found := [line for check in checks for line in check(root, version)]:
        return found
    with tempfile.TemporaryDirectory() as scratch:
        clone, outs = Path(scratch, "clone"), (Path(scratch, "first"), Path(scratch, "second"))
        git(root, "clone", "--quiet", str(root), str(clone))  # elsewhere, later, and of committed files alone
        first, second = (built(out, source) for out, source in zip(outs, (root, clone), strict=True))
        if found := list(missing_in_builds(root, first, second)):
            return found
        if not checked and subprocess.run([".ci/run"], cwd=root).returncode:
            return [".ci/run must pass"]
        shutil.rmtree(root / "dist", ignore_errors=True)  # what .ci/run has built there, maybe by another hatchling
        (root / "dist").mkdir()
        for path in (first.archive, first.wheel):
            shutil.copy(path, root / "dist" / path.name)
    return []


def main(words: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__.splitlines()[0])
    parser.add_argument("--checked", action="store_true", help="leave out .ci/run, which has passed on this commit")
    found = missing(root, parser.parse_args(words).checked)
    for line in found:
        print(f"missing: {line}")
    if found:
        return 1
    tag, artifacts = f"v{version_of(root)}", sorted((root / "dist").iterdir())
    for path in artifacts:
        print(f"{sha256(path)}  dist/{path.name}")
    print("nothing is missing; what is left to do:")
    if not git(root, "tag", "--list", tag):
        print(f"    git tag --annotate {tag} --message {tag}")
    print(f"    git push origin {tag}")
    print(f"    python -m twine upload {' '.join(f'dist/{path.name}' for path in artifacts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
