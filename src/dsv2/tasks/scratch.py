"""The folder that one program may write to: made, measured and removed by the judge.

A confined program can make plain files in it and nothing else, so that it is one step deep.
"""

import contextlib
import os
import tempfile


def scratch_folder(allowed_bytes: int) -> "contextlib.AbstractContextManager[str]":
    """Make a folder for one run and remove it afterwards; "" where nothing may be written."""
    if not allowed_bytes:
        return contextlib.nullcontext("")
    return tempfile.TemporaryDirectory(prefix="dsv2-", ignore_cleanup_errors=True)


def folder_bytes(folder: str) -> int:
    """Return what its files take; each counts a block of 4 KiB at least, so that empty ones are not free."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return sum(max(entry.stat(follow_symlinks=False).st_size, 4096) for entry in entries)
    return 0
