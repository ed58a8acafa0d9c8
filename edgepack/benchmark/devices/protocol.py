"""What a device must be able to do, and the commands that reach a shell on it."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote
from typing import IO, Protocol

from edgepack.errors import DeviceError

SHORT_S = 60.0
"""For all but the transfer of files and the bench itself, seconds."""
LONG_S = 3600.0
NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes of a POSIX shell."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command on a device ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """The last line that it said of itself."""
        said = [line.strip() for line in f"{self.stdout}\n{self.stderr}".splitlines() if line.strip()]
        return said[-1] if said else f"exit code {self.code}"


class Device(Protocol):
    """A place that runs the bench: a folder of its own on another machine, or on this one."""

    @property
    def name(self) -> str:
        """As the user named it."""

    @property
    def folder(self) -> str:
        """The folder on the device that all of the bench is in."""

    def push(self, file: Path, name: str) -> None:
        """Copy ``file`` into the folder.

        Raises:
            DeviceError: it did not arrive whole.
        """

    def run(self, words: Sequence[str], timeout_s: float) -> Done:
        """Run a program with its arguments, none of which a shell interprets; standard input stays open.

        Raises:
            DeviceError: the device was lost, or it took too long.
        """

    def pull(self, name: str, file: Path) -> None:
        """Copy a file of the folder to ``file``.

        Raises:
            DeviceError: it did not arrive.
        """

    def remove(self) -> None:
        """Remove the folder and all that was started for it."""


@dataclass(frozen=True, slots=True)
class Shell:
    """The way to a POSIX shell: ``words`` and one more word, the command line that it runs there."""

    name: str
    words: tuple[str, ...]
    lost_codes: tuple[int, ...] = ()
    """Exit codes by which the program on this side says that it did not get through."""

    def run(
        self,
        command: str,
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int = subprocess.PIPE,
        timeout_s: float = SHORT_S,
    ) -> Done:
        """Run a command line, in which all that users gave must be quoted.

        Raises:
            DeviceError: the device was not reached, or it took longer than ``timeout_s``.
        """
        done = call([*self.words, command], self.name, stdin=stdin, stdout=stdout, timeout_s=timeout_s)
        if done.code in self.lost_codes:
            raise DeviceError(f"{self.name}: cannot be reached, or the connection broke: {done.reason}")
        return done

    def make_folder(self, parent: str) -> str:
        """A new folder in ``parent``, for nobody else to read.

        Raises:
            DeviceError: it cannot be made.
        """
        done = self.run(f"umask 077 && mktemp -d {quote(parent + '/edgepack-XXXXXXXX')}")
        folder = done.stdout.strip()
        if done.code or not folder:
            raise DeviceError(f"{self.name}: no folder can be made in {parent}: {done.reason}")
        return folder


def call(
    words: Sequence[str],
    name: str,
    *,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int = subprocess.PIPE,
    timeout_s: float = SHORT_S,
) -> Done:
    """Run a program of this machine that speaks to the device ``name``.

    ``stdin`` may be ``PIPE``: it then stays open as long as the program runs, and ends with this process.

    Raises:
        DeviceError: the program is not installed, or takes longer than ``timeout_s``.
    """
    try:
        process = subprocess.Popen(words, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise DeviceError(f"{name}: needs the program {words[0]!r}, which is not installed here") from error
    held, process.stdin = process.stdin, None  # or communicate() would close it at once
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{name}: no answer within {timeout_s:.0f} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if held:
            held.close()
    return Done(process.returncode, *((part or b"").decode("utf-8", "replace") for part in (out, err)))


@dataclass(frozen=True, slots=True)
class ShellDevice:
    """A device that a shell is all there is to know of: files go through its standard input and output."""

    shell: Shell
    folder: str

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.shell.name

    def push(self, file: Path, name: str) -> None:
        """See :class:`Device`; what arrived in part is removed with the folder, even if this side is gone."""
        path, folder = quote(f"{self.folder}/{name}"), quote(self.folder)
        size = file.stat().st_size
        whole = f'[ "$(wc -c < {path})" -eq {size} ]'
        with file.open("rb") as content:
            done = self.shell.run(
                f"cat > {path} && {whole} || {{ rm -rf {folder}; exit 1; }}", stdin=content, timeout_s=LONG_S
            )
        if done.code:
            raise DeviceError(
                f"{self.name}: {size} bytes could not be written to {self.folder}: "
                f"{done.reason}; make space there"
            )

    def run(self, words: Sequence[str], timeout_s: float) -> Done:
        """See :class:`Device`."""
        return self.shell.run(join(words), stdin=subprocess.PIPE, timeout_s=timeout_s)

    def pull(self, name: str, file: Path) -> None:
        """See :class:`Device`."""
        with file.open("wb") as content:
            path = quote(f"{self.folder}/{name}")
            done = self.shell.run(f"cat {path}", stdout=content, timeout_s=LONG_S)
        if done.code:
            raise DeviceError(f"{self.name}: {name} did not come back: {done.reason}")

    def remove(self) -> None:
        """See :class:`Device`."""
        self.shell.run(f"rm -rf {quote(self.folder)}")
