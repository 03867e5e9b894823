"""Write tables so that no reader ever sees half of one, and two writers lose nothing of each other's.

A table that a sweep leaves for this user is private: so are its folder and its lock, and rows of a file that others may
write are not kept. One that is written where the user says, to be handed on, is for all to read.
"""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import owned
from .tables import Table, dump, load, parse


@contextmanager
def locked(path: Path, private: bool = True) -> Iterator[bool | None]:
    """Hold the lock of a file, which is a file beside it; where nothing can be locked (None), go on without.

    Args:
        path: the file; its folder is made.
        private: whether the folder and the lock must be this user's.

    Raises:
        OSError: nothing can be written there.
    """
    if os.path.lexists(path) and not path.is_file():  # to put a file in the place of /dev/null would be no help
        raise OSError("it must be a file")
    owned.make_folder(path.parent)
    if private:
        owned.check_folder(path.parent)
    side = owned.opened(path.with_name(path.name + ".lock"), os.O_WRONLY | os.O_CREAT, private)
    try:
        yield owned.lock(side)
    finally:
        os.close(side)


def save(path: Path, table: Table, private: bool = True) -> None:
    """Write a table, keeping the rows of the one that is there which this one says nothing of.

    Args:
        path: the file; its folder is made.
        table: the rows and where they come from.
        private: whether the file is for this user alone, and what is there must be as well.

    Raises:
        OSError: the file cannot be written; the old one is then as it was.
        ValueError: no reader would take the table.
    """
    with locked(path, private) as alone:
        if alone:
            _clear(path)
        text = dump(merged(path, table, private))
        parse(text.encode())
        _replace(path, text, 0o600 if private else 0o644)


def merged(path: Path, table: Table, private: bool = True) -> Table:
    """A table with the rows of a file that it says nothing of; one that is no table of its target is put aside."""
    if not os.path.lexists(path):
        return table
    old = load(path, {"target": table.target}, owned=private)
    if old is None:
        os.replace(path, path.with_name(path.name + ".bad"))  # for its owner to look at
        return table
    same = old.triton == table.triton and table.kernels in ("", old.kernels) and table.gpu in ("", old.gpu)
    kept = [row for row in old.rows if same or row.ms == 0]  # a timing on another GPU or of other kernels says nothing
    rows = {row[:6]: row for row in (*kept, *table.rows)}
    origin = old if same else table
    gpu, kernels = table.gpu or origin.gpu, table.kernels or origin.kernels
    timed = any(row.ms > 0 for row in rows.values())
    return table._replace(gpu=gpu, kernels=kernels, timed=timed, rows=tuple(rows.values()))


def _clear(path: Path) -> None:
    """Remove what killed writers have left; who holds the lock knows that nobody else is writing."""
    for draft in path.parent.glob(f"{glob.escape(path.name)}.????????.tmp"):
        draft.unlink(missing_ok=True)


def _replace(path: Path, text: str, mode: int) -> None:
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
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
