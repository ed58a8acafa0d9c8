"""An Android device, or another with its debug bridge, through the ``adb`` program."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join

from edgepack.benchmark.devices.protocol import LONG_S, Done, Shell, ShellDevice, call
from edgepack.errors import ConfigError, DeviceError

PARENT = "/data/local/tmp"
"""The only folder of Android that a shell can write to and execute from."""
LOST = re.compile(r"^(adb|error): (device|no devices|connect|protocol|closed|more than one)|^error: ", re.M)


@dataclass(frozen=True, slots=True)
class AdbDevice:
    """A shell for commands; ``adb push`` and ``adb pull`` for files."""

    shell_device: ShellDevice
    adb: tuple[str, ...]

    @property
    def name(self) -> str:
        """The address that the user gave."""
        return self.shell_device.name

    @property
    def folder(self) -> str:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        return self.shell_device.folder

    def push(self, file: Path, name: str) -> None:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        done = call([*self.adb, "push", str(file), f"{self.folder}/{name}"], self.name, timeout_s=LONG_S)
        if done.code:
            size = file.stat().st_size
            raise DeviceError(
                f"{self.name}: {size} bytes could not be written to {self.folder}: {done.reason}"
            )

    def run(self, words: Sequence[str], timeout_s: float) -> Done:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        done = call([*self.adb, "shell", join(words)], self.name, stdin=subprocess.PIPE, timeout_s=timeout_s)
        if done.code and LOST.search(done.stderr):
            raise DeviceError(f"{self.name}: cannot be reached, or the connection broke: {done.reason}")
        return done

    def pull(self, name: str, file: Path) -> None:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        done = call([*self.adb, "pull", f"{self.folder}/{name}", str(file)], self.name, timeout_s=LONG_S)
        if done.code:
            raise DeviceError(f"{self.name}: {name} did not come back: {done.reason}")

    def remove(self) -> None:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        self.shell_device.remove()


def open_adb(address: str) -> AdbDevice:
    """A new folder on the device ``adb`` or ``adb:serial``.

    Raises:
        ConfigError: an invalid serial number.
        DeviceError: there is no such device, or more than one, or no folder can be made on it.
    """
    serial = address.partition(":")[2]
    if serial.startswith("-") or (":" in address and not serial):
        raise ConfigError(f"--device {address!r}: no serial number; `adb devices` lists them: adb:SERIAL")
    adb = ("adb", *(("-s", serial) if serial else ()))
    there = call([*adb, "get-state"], address)
    if there.code or there.stdout.strip() != "device":
        raise DeviceError(f"{address}: cannot be reached: {there.reason}; see `adb devices`")
    shell = Shell(address, (*adb, "shell"))
    return AdbDevice(ShellDevice(shell, shell.make_folder(PARENT)), adb)
