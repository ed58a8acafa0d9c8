"""The working folder of a build, and the move of its finished package to the output folder."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgepack.errors import ExportError

PREFIX = ".edgepack-"


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output``, on the same disk so that publishing is a rename; always removed.

    All temporary files of the process go there: a copy of a model may take gigabytes, for which the system's
    temporary folder (often in memory) has no room. A process that is killed cannot remove its folder; the
    kernel releases its lock, and the next build that writes to the same place removes the folder.

    Raises:
        ExportError: the folder cannot be created, or ``output`` is not writable.
    """
    try:
        folder, lock = _make(output)
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written ({error.strerror}); name a folder that you may write to with -o"
        ) from error
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(f"{folder.parent}: the disk is full; free some room, or build elsewhere") from error
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def publish(package: Path, output: Path, outdated: Iterable[Path] = ()) -> None:
    """Move a finished package to ``output``: as a whole if that is new or empty, else file by file.

    The report is moved last, so that all files a new report refers to exist. Before that, ``outdated`` files
    of an earlier package are removed, so that none is mistaken for a part of this one.

    Raises:
        ExportError: a file operation fails.
    """
    try:
        if not output.exists() or not any(output.iterdir()):
            package.replace(output)
            return
        for file in outdated:
            file.unlink(missing_ok=True)
        for file in sorted(package.iterdir(), key=lambda f: (f.name.startswith("report."), f.name)):
            file.replace(output / file.name)
    except OSError as error:
        raise ExportError(f"{output}: the package cannot be moved there ({error.strerror})") from error


def _make(output: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock, which marks it as in use."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        if not output.is_dir():
            raise ExportError(f"{output}: is a file; the output must be a folder, name another with -o")
        Path(tempfile.mkdtemp(prefix=PREFIX, dir=output)).rmdir()  # writable too?
    # Only one build at a time scans and creates here, so that no folder is removed before it is locked.
    turn = os.open(parent, os.O_RDONLY)
    try:
        if _lock(turn, wait=True):
            _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        own = os.open(folder, os.O_RDONLY)
        _lock(own, wait=False)
    finally:
        os.close(turn)
    return folder, own


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # another user's, or gone
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _lock(descriptor, wait=False):
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Try to take the lock: fails while another process has it, or on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise
    return True
