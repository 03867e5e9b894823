"""First use elsewhere: wheel and sdist in clean environments of every Python, without Triton, and on other platforms.

`.ci/run` ends with these. What is installed comes from pip's index, so they are slow, all but the pretended platforms.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flash._version import __version__
from tests.builds import ROOT, Built, built

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
TORCH = "torch==2.13.0"
FIRST_USE = ROOT / "tests" / "first_use.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(tmp_path_factory.mktemp("built"))


def run(*words: str | Path, cwd: Path) -> str:
    """What a program prints, none of this checkout's paths or settings about it; AssertionError where it fails."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_"))}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=usual, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@cache
def interpreter(version: str) -> str | None:
    """A Python of a version that starts: this one, one on PATH, or one of pyenv's."""
    of_pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in (sys.executable, shutil.which(f"python{version}"), *map(str, of_pyenv)):
        if candidate is not None:
            say = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            if subprocess.run(say, capture_output=True, text=True).stdout.strip() == version:
                return candidate
    return None


class Environment:
    """A virtual environment of its own, empty but for pip."""

    def __init__(self, version: str, folder: Path) -> None:
        base = interpreter(version)
        if base is None:
            pytest.skip(f"needs Python {version}, on PATH or in pyenv")
        run(base, "-m", "venv", folder, cwd=folder.parent)
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    def pip(self, *words: str | Path) -> str:
        return run(self.python, "-m", "pip", "--disable-pip-version-check", *words, cwd=self.folder)

    def would_install(self, *words: str | Path) -> list[dict[str, object]]:
        """The metadata of what pip would install; nothing is."""
        told = self.pip("install", "--quiet", "--dry-run", "--report", "-", *words)
        return [item["metadata"] for item in json.loads(told)["install"]]

    def finds_small_torch(self) -> bool:
        """Whether the torch that pip finds brings no gigabytes of CUDA: a build for CPUs, or for another system."""
        (metadata,) = self.would_install("--no-deps", TORCH)
        needs = [Requirement(text) for text in metadata["requires_dist"]]
        here = [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
        return not [name for name in here if name.startswith(("nvidia", "cuda"))]

    def files(self) -> list[str]:
        """What is installed of this library, as pip has it in its record."""
        _, _, listed = self.pip("show", "--files", "flash-triton").partition("Files:")
        return [name for name in map(str.strip, listed.splitlines()) if name.startswith("flash/")]

    def compile(self) -> None:
        """Compile every file of this library; a warning is an error."""
        folder = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=self.folder)
        run(self.python, "-W", "error", "-m", "compileall", "-q", "-f", Path(folder.strip(), "flash"), cwd=self.folder)

    def first_use(self) -> dict[str, object]:
        """What tests/first_use.py finds, started in a folder without the checkout; isolated from what users set."""
        found = json.loads(run(self.python, "-I", FIRST_USE, cwd=self.folder))
        assert Path(found["package"]).is_relative_to(self.folder.resolve()), found
        assert found["version"] == __version__ and found["tables"] and found["typed"]
        return found


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_wheel_and_sdist_install_and_import_in_a_clean_environment(version: str, made: Built, tmp_path: Path) -> None:
    """On each Python: pip takes wheel and sdist, every file compiles, and what they and their extras need is found.

    The Python at hand, and each for which pip finds a torch without CUDA, also installs all that is needed and attends,
    forward and backward. On the others nothing is imported: that would take gigabytes of torch.
    """
    environment = Environment(version, tmp_path / "venv")
    wanted = environment.would_install("-c", ROOT / "constraints.txt", f"{made.wheel}[bench,dev,test]")
    assert {"torch", "pytest", "matplotlib", "ruff"} <= {item["name"].lower() for item in wanted}
    whole = version == HERE or environment.finds_small_torch()
    if whole:
        environment.pip("install", "--no-compile", TORCH)
    environment.pip("install", "-c", ROOT / "constraints.txt", *([] if whole else ["--no-deps"]), made.wheel)
    of_wheel = environment.files()
    environment.compile()
    found = environment.first_use() if whole else None
    environment.pip("install", "--force-reinstall", "--no-deps", made.archive)
    assert environment.files() == of_wheel
    environment.compile()
    assert whole is False or environment.first_use() == found
    assert found is None or found["triton"] is (sys.platform == "linux")


@pytest.mark.slow
def test_it_imports_and_serves_without_triton(made: Built, tmp_path: Path) -> None:
    environment = Environment(HERE, tmp_path / "venv")
    environment.pip("install", "--no-compile", TORCH)
    environment.pip("install", "--no-deps", made.wheel)
    environment.pip("uninstall", "--yes", "triton")
    found = environment.first_use()
    assert found["triton"] is False
    assert found["info"]["backend"] == "torch" and "not installed" in found["info"]["backends"]["triton"]


# Runs tests/first_use.py as if this were another system, whose Python has fewer modules and fewer functions of the
# system; torch comes first, as it could not be imported then.
PRETEND = """
import json, os, platform, runpy, sys
from pathlib import Path
import torch
system, name, machine, scratch = sys.argv[1:]
sys.path.insert(0, os.getcwd())
sys.modules["triton"] = None
sys.platform, platform.system, platform.machine = name, lambda: system, lambda: machine
if name == "win32":
    sys.modules.update(dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios")))
    posix = "fchmod fchown fork getegid geteuid getgid getloadavg getpgid getuid killpg mkfifo sched_getaffinity setsid"
    for gone in (*posix.split(), "O_NOFOLLOW"):
        if hasattr(os, gone):
            delattr(os, gone)
first_use = runpy.run_path("tests/first_use.py")
first_use["call"]()

from flash import dispatch
from flash.autotune import store, tables
table = tables.shipped_table("cuda:90")
path = Path(scratch, "folder", tables.user_table_name("cuda:90", "NVIDIA H100 80GB HBM3"))
store.save(path, table)
store.save(path, table)  # over the one that is there
assert tables.load(path, {"target": "cuda:90"}, owned=True) == table
choice = tables.lookup("cuda:90", "forward", "float16", 64, 1000, True, "NVIDIA H100 80GB HBM3")
told = {
    "file": path.name,
    "folder": tables.user_folder(),
    "shipped": choice.reason,
    "mps": [dispatch.refusal(backend, torch.device("mps"), torch.float32, 64) for backend in dispatch.PREFERENCE],
}
print(json.dumps(first_use["found"]() | told))
"""


@pytest.mark.parametrize("system, name, machine", [("Windows", "win32", "AMD64"), ("Darwin", "darwin", "arm64")])
def test_windows_and_macos_are_served_by_torch(system: str, name: str, machine: str, tmp_path: Path) -> None:
    """The library asks no more of a system than those two have; neither of them itself is at hand."""
    told = json.loads(run(sys.executable, "-c", PRETEND, system, name, machine, tmp_path, cwd=ROOT))
    assert told["triton"] is False and told["folder"] is None
    assert told["info"]["backend"] == "torch" and told["info"]["backends"]["torch"] == "served"
    hopper, triton, torch_backend = told["mps"]
    assert "mps is none" in hopper and "it exists for Linux only" in triton and torch_backend is None
    assert told["shipped"].startswith("shipped table of cuda:90")
    assert not set(told["file"]) & set('<>:"/\\|?*')  # no file of such a name can be made on Windows
