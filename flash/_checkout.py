"""Says so when the links flash/kernels and flash/autotune did not survive a checkout, and how to mend it.

In a checkout both are symbolic links to the folders beside flash/; in a wheel or an sdist they are real folders. Git
without core.symlinks (Windows) writes a small text file in their place, some archive tools write nothing. The build
reads this file too, so it uses the standard library only.
"""

from pathlib import Path

LINKS = {"kernels": "spec.py", "autotune": "tables.py"}  # name of the link: a file that must lie behind it

MEND = """\
In a git clone (on Windows first turn on developer mode, which allows links):
    git config core.symlinks true
    git checkout -- flash/kernels flash/autotune
Without git, from the checkout's root:
    Linux, macOS:  rm -rf flash/kernels flash/autotune && ln -s ../kernels ../autotune flash/
    Windows:       del flash\\kernels flash\\autotune
                   mklink /J flash\\kernels kernels
                   mklink /J flash\\autotune autotune
Wheels and sdists hold real folders and need none of this."""


def require_links(package: Path | None = None) -> None:
    """Check that flash/kernels and flash/autotune lead to their folders.

    Args:
        package: the folder `flash`; the one this file lies in by default.

    Raises:
        ImportError: a link is missing or is a text file; the message says how to mend it.
    """
    package = Path(__file__).parent if package is None else package
    broken = [f"flash/{name}" for name, proof in LINKS.items() if not (package / name / proof).is_file()]
    if broken:
        raise ImportError(f"{' and '.join(broken)} must be a link to the folder beside flash/, and is not.\n{MEND}")
