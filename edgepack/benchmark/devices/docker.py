"""A container of an image with Python and the runtime, through the ``docker`` program."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.benchmark.devices.protocol import LONG_S, Done, Shell, ShellDevice, call
from edgepack.errors import ConfigError, DeviceError


@dataclass(frozen=True, slots=True)
class Container:
    """A shell in a container, which is removed after the benchmark."""

    inside: ShellDevice
    identity: str

    @property
    def name(self) -> str:
        """The address that the user gave."""
        return self.inside.name

    @property
    def folder(self) -> str:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        return self.inside.folder

    def push(self, file: Path, name: str) -> None:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        self.inside.push(file, name)

    def run(self, words: Sequence[str], timeout_s: float) -> Done:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        return self.inside.run(words, timeout_s)

    def pull(self, name: str, file: Path) -> None:
        """See :class:`edgepack.benchmark.devices.protocol.Device`."""
        self.inside.pull(name, file)

    def remove(self) -> None:
        """Remove the container and its folder."""
        call(["docker", "rm", "--force", self.identity], self.name)


def open_docker(address: str) -> Container:
    """A container of ``docker:IMAGE`` or ``docker:linux/arm64@IMAGE``, without a network.

    Raises:
        ConfigError: the address has no image.
        DeviceError: docker cannot start it, or cannot run it on this processor.
    """
    platform, at, image = address.partition(":")[2].partition("@")
    if not at or "/" not in platform or platform.count("/") > 2 or not platform.startswith("linux/"):
        platform, image = "", address.partition(":")[2]
    if not image or image.startswith("-"):
        raise ConfigError(f"--device {address!r}: no image; write docker:IMAGE or docker:linux/arm64@IMAGE")
    where = ("--platform", platform) if platform else ()
    # The container ends after an hour, also where edgepack was killed.
    start = ["docker", "run", "--detach", "--rm", "--network=none", *where, "--entrypoint", "sleep", image]
    done = call([*start, f"{LONG_S:.0f}"], address, timeout_s=LONG_S)
    if done.code:
        raise DeviceError(f"{address}: cannot be started: {done.reason}")
    identity = done.stdout.split()[-1]
    shell = Shell(address, ("docker", "exec", "--interactive", identity, "sh", "-c"))
    try:
        return Container(ShellDevice(shell, shell.make_folder("/tmp")), identity)
    except DeviceError:
        call(["docker", "rm", "--force", identity], address)
        raise
