"""A file that remembers finished work, one JSON object a line, so that a killed run goes on where it was.

A line is on the disk before the next piece of work begins. The last line may be torn by a kill: it is dropped, and the
work it spoke of is done again. Runs at the same time may share a journal: the last of them removes it.
"""

import errno
import json
import os
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import owned

LARGEST = 2**26  # bytes; a line of a sweep has some hundred


class Journal:
    """Finished work by its key. What cannot be read or written is told once, and costs only time.

    Args:
        path: the file; made with its folder when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self._close: weakref.finalize[[int], Journal] | None = None
        self._descriptor = -1
        self._told = False
        try:
            text = owned.read(path, LARGEST)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._tell(f"ignoring the journal {path}: {error}")
            if not path.is_dir():
                with suppress(OSError):
                    os.replace(path, path.with_name(path.name + ".bad"))
            return
        for line in text.split(b"\n"):
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self.entries[str(entry["key"])] = entry["value"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return  # torn by a kill, or not ours

    def _tell(self, words: str) -> None:
        if not self._told:
            warnings.warn(words, RuntimeWarning, stacklevel=3)
        self._told = True

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def write(self, key: str, value: Any) -> None:
        """Remember a finished piece of work; it is on the disk when this returns, where there is room for it."""
        line = json.dumps({"key": key, "value": value}).encode()
        self.entries[key] = value
        try:
            self._append(b"\n" + line + b"\n")  # a newline first: it ends a torn line
        except OSError as error:
            self._tell(f"cannot write the journal {self.path}: {error}; a killed run would start over")

    def _append(self, text: bytes) -> None:
        descriptor = self._open()
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)

    def _open(self) -> int:
        """The file, open and its lock shared with other runs until this one ends."""
        while self._close is None:
            owned.make_folder(self.path.parent)
            descriptor = owned.opened(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._close = weakref.finalize(self, os.close, descriptor)
            self._descriptor = descriptor
            owned.lock(descriptor, shared=True)
            if not self._is_there():  # another run has removed it meanwhile
                self._let_go()
        return self._descriptor

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _let_go(self) -> None:
        if self._close is not None:
            self._close()
        self._close = None

    def remove(self) -> None:
        """Forget everything: the work is finished. The file goes with the last run that uses it."""
        self.entries.clear()
        with suppress(OSError):  # what stays says of finished work that it is finished
            if self.path.exists() and owned.lock(self._open(), wait=False) is not False:
                self.path.unlink(missing_ok=True)
        self._let_go()
