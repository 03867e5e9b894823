"""A file that remembers finished work, one JSON object a line, so that a killed run goes on where it was.

A line is on the disk before the next piece of work begins. The last line may be torn by a kill: it is dropped, and the
work it spoke of is done again.
"""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Finished work by its key.

    Args:
        path: the file; made with its folder when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        if path.is_file():
            lines = path.read_bytes().split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self.entries[str(entry["key"])] = entry["value"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return  # torn by a kill, or not ours

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def write(self, key: str, value: Any) -> None:
        """Remember a finished piece of work; it is on the disk when this returns."""
        line = json.dumps({"key": key, "value": value}).encode()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # a newline first: it ends a torn line
        with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
            file.write(b"\n" + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[key] = value

    def remove(self) -> None:
        """Forget everything: the work is finished."""
        self.path.unlink(missing_ok=True)
        self.entries.clear()
