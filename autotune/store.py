"""Write tables so that no reader ever sees half of one, and two writers lose nothing of each other's."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .tables import Table, dump, load


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is a file beside it; where nothing can be locked, go on without."""
    with open(path.with_name(path.name + ".lock"), "ab") as side:
        try:
            import fcntl

            fcntl.flock(side, fcntl.LOCK_EX)
        except (ImportError, OSError):  # not POSIX, or a network file system: the last writer wins
            pass
        yield


def save(path: Path, table: Table, mode: int = 0o600) -> None:
    """Write a table, keeping the rows of the one that is there which this one says nothing of.

    Args:
        path: the file; its folder is made.
        table: the rows and where they come from.
        mode: permissions of the file.

    Raises:
        OSError: the file cannot be written; the old one is then as it was.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path):
        _replace(path, dump(merged(path, table)), mode)


def merged(path: Path, table: Table) -> Table:
    """A table with the rows of a file that it says nothing of; a file that is no table of its target adds none."""
    if not path.exists():
        return table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        old = load(path, {"target": table.target})
    if old is None:
        _keep_bad(path)
        return table
    same = old.triton == table.triton and table.kernels in ("", old.kernels) and table.gpu in ("", old.gpu)
    kept = [row for row in old.rows if same or row.ms == 0]  # a timing on another GPU or of other kernels says nothing
    rows = {row[:6]: row for row in (*kept, *table.rows)}
    origin = old if same else table
    gpu, kernels = table.gpu or origin.gpu, table.kernels or origin.kernels
    timed = any(row.ms > 0 for row in rows.values())
    return table._replace(gpu=gpu, kernels=kernels, timed=timed, rows=tuple(rows.values()))


def _keep_bad(path: Path) -> None:
    """Put a file that cannot be read aside, for its owner to look at."""
    os.replace(path, path.with_name(path.name + ".bad"))


def _replace(path: Path, text: str, mode: int) -> None:
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, mode)  # by name: Windows has no other way
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
