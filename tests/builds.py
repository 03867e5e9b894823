"""What is built of a checkout: the sdist, unpacked, and wheels, as `python -m build` makes them."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Built(NamedTuple):
    """An sdist, the folder that it was unpacked to, and the wheel made in that folder."""

    archive: Path
    sdist: Path
    wheel: Path


def build(target: str, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """`python -m build` in the environment at hand: one step, nothing downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    usual = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    return subprocess.run(command, cwd=source, env=usual, capture_output=True, text=True, timeout=120)


def copy_checkout(target: Path) -> Path:
    """The files that a build reads, with the links as links."""
    target.mkdir()
    for name in ("flash", "kernels", "autotune"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(wheel: Path, listing: Path) -> list[str]:
    """Lines to add to ("+") and to take from ("-") a list of a wheel's files, for it to be one of this wheel's."""
    listed = listing.read_text(encoding="utf-8").splitlines()
    with zipfile.ZipFile(wheel) as archive:
        names = [re.sub(r"^(flash_triton)-[^/]+(\.dist-info/)", r"\1\2", name) for name in archive.namelist()]
    new, gone = sorted({*names} - {*listed}), sorted({*listed} - {*names})
    return [*(f"+ {name}" for name in new), *(f"- {name}" for name in gone)]


def built(out: Path, source: Path = ROOT) -> Built:
    """An sdist of a checkout, and the wheel made from it."""
    done = build("sdist", source, out)
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("flash_triton-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(out, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    sdist = out / archive.name.removesuffix(".tar.gz")
    done = build("wheel", sdist, out)
    assert done.returncode == 0, done.stderr
    return Built(archive, sdist, next(out.glob("*.whl")))
