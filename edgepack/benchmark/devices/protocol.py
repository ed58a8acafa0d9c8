"""The interface of a device, and the commands that reach a shell on it."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote
from typing import IO, Protocol

from edgepack.errors import DeviceError

SHORT_S = 60.0
"""Timeout in seconds of all commands but file transfers and the benchmark."""
LONG_S = 3600.0
NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes of a POSIX shell."""


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a command on a device."""

    code: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """The last line of its output."""
        lines = [line.strip() for line in f"{self.stdout}\n{self.stderr}".splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


class Device(Protocol):
    """A folder on another machine, or on this one, in which the benchmark runs."""

    @property
    def name(self) -> str:
        """The address that the user gave."""

    @property
    def folder(self) -> str:
        """The folder of the benchmark on the device."""

    def push(self, file: Path, name: str) -> None:
        """Copy ``file`` into the folder.

        Raises:
            DeviceError: it was not copied completely.
        """

    def run(self, words: Sequence[str], timeout_s: float) -> Done:
        """Run a program with its arguments, which no shell interprets; standard input stays open.

        Raises:
            DeviceError: the device was lost, or it took too long.
        """

    def pull(self, name: str, file: Path) -> None:
        """Copy a file of the folder to ``file``.

        Raises:
            DeviceError: it was not copied.
        """

    def remove(self) -> None:
        """Remove the folder, and the container where there is one."""


@dataclass(frozen=True, slots=True)
class Shell:
    """A POSIX shell: ``words`` and one more argument, the command line for the device."""

    name: str
    words: tuple[str, ...]
    lost_codes: tuple[int, ...] = ()
    """Exit codes of the program on this host that mean a failed connection."""

    def run(
        self,
        command: str,
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int = subprocess.PIPE,
        timeout_s: float = SHORT_S,
    ) -> Done:
        """Run a command line; values from users must be quoted in it.

        Raises:
            DeviceError: the device was not reached, or it took longer than ``timeout_s``.
        """
        done = call([*self.words, command], self.name, stdin=stdin, stdout=stdout, timeout_s=timeout_s)
        if done.code in self.lost_codes:
            raise DeviceError(f"{self.name}: cannot be reached, or the connection broke: {done.reason}")
        return done

    def make_folder(self, parent: str) -> str:
        """A new folder in ``parent`` that other users cannot read.

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
    """Run a program of this host that talks to the device ``name``.

    ``stdin`` may be ``PIPE``: it then stays open while the program runs, and closes when this process ends.

    Raises:
        DeviceError: the program is not installed, or takes longer than ``timeout_s``.
    """
    try:
        process = subprocess.Popen(words, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise DeviceError(f"{name}: needs the program {words[0]!r}, which is not installed here") from error
    stdin_pipe, process.stdin = process.stdin, None  # communicate() would close it at once
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{name}: no answer within {timeout_s:.0f} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if stdin_pipe:
            stdin_pipe.close()
    return Done(process.returncode, *((part or b"").decode("utf-8", "replace") for part in (out, err)))


@dataclass(frozen=True, slots=True)
class ShellDevice:
    """A device with a shell only: files are copied through standard input and output."""

    shell: Shell
    folder: str

    @property
    def name(self) -> str:
        """The address that the user gave."""
        return self.shell.name

    def push(self, file: Path, name: str) -> None:
        """See :class:`Device`; the device removes its folder where a file is incomplete."""
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
                f"{done.reason}; free some space there"
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
            raise DeviceError(f"{self.name}: {name} could not be copied back: {done.reason}")

    def remove(self) -> None:
        """See :class:`Device`."""
        self.shell.run(f"rm -rf {quote(self.folder)}")
