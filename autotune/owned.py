"""Files of this user alone: what is read nobody else can have written, and what is written nobody else can read.

What a file is, is asked of the open one, so that no other can take its place in between. Opening waits for nobody: a
pipe in place of a file is refused, as a link, a folder or a device is.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def opened(path: Path, flags: int, owned: bool = True) -> int:
    """The descriptor of a regular file; one that is made is this user's alone.

    Args:
        path: the file.
        flags: as os.open takes them; what may be made is no link.
        owned: whether it must be no link, belong to this user, and be one that nobody else may write to; of what is
            written there may be no second name.

    Returns:
        The descriptor.

    Raises:
        OSError: it cannot be opened, or is not what it must be.
    """
    descriptor = os.open(path, flags | AT_ONCE | (NO_LINK if owned or flags & os.O_CREAT else 0), 0o600)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError("it must be a file")
        if owned and not is_private(about):
            raise PermissionError("it must belong to this user, and others must not be able to write to it")
        if owned and flags & os.O_WRONLY and about.st_nlink > 1:  # somebody may have given another file this name
            raise PermissionError("it must have no other name")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_private(about: os.stat_result) -> bool:
    """Whether something belongs to this user, and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return True
    return about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def read(path: Path, most: int, owned: bool = True) -> bytes:
    """What a file holds.

    Args:
        path: the file.
        most: bytes that it may have.
        owned: as in `opened`.

    Returns:
        All of it.

    Raises:
        OSError: as `opened` raises it.
        ValueError: it is larger.
    """
    with os.fdopen(opened(path, os.O_RDONLY, owned), "rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it must have at most {most} bytes")
    return text


def check_folder(path: Path) -> None:
    """Raise PermissionError unless a folder is this user's, no link, and nobody else may write to it."""
    about = os.lstat(path)
    if not stat.S_ISDIR(about.st_mode) or not is_private(about):
        raise PermissionError(f"{path} must be a folder of this user, no link, that others cannot write to")


def make_folder(path: Path) -> None:
    """Make a folder and what is missing of those above it, for this user alone whatever the umask is."""
    if not path.is_dir():
        make_folder(path.parent)
        with suppress(FileExistsError):
            path.mkdir(0o700)


def lock(descriptor: int, shared: bool = False, wait: bool = True) -> bool | None:
    """Take the lock of an open file; a process that ends lets go of it, however it ends.

    Args:
        descriptor: of the file.
        shared: whether others may have it at the same time, who share it too.
        wait: whether to wait for it.

    Returns:
        Whether it was had; None where nothing can be locked: no POSIX, or a network file system.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True
