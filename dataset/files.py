"""Looks at what a path names, before anything reads it."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from simla.utils import CONTENT_BYTES, other_content


def file_status(path: str | Path) -> os.stat_result:
    """Return the status of a file or folder. OSError for what is neither: reading a pipe to which nobody
    writes would take for ever.
    """
    try:
        status = Path(path).stat()
    except ValueError as error:  # NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"no name that a file can have ({error})") from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "not a file, but a pipe, socket or device")
    return status


def other_file(path: Path) -> str:
    """Return what a file is that is not what was asked for, and what to do; "" where that cannot be told."""
    with suppress(OSError), path.open("rb") as file:
        return other_content(file.read(CONTENT_BYTES))
    return ""
