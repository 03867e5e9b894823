"""What is built of a checkout: the sdist, unpacked, and wheels, as `python -m build` makes them."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from flash._version import __version__

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


def built(out: Path, source: Path = ROOT) -> Built:
    """An sdist of a checkout, and the wheel made from it."""
    done = build("sdist", source, out)
    assert done.returncode == 0, done.stderr
    archive = out / f"flash_triton-{__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        opened.extractall(out, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    sdist = out / f"flash_triton-{__version__}"
    done = build("wheel", sdist, out)
    assert done.returncode == 0, done.stderr
    return Built(archive, sdist, next(out.glob("*.whl")))
