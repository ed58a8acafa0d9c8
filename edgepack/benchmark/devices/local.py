"""This machine as a device."""

from edgepack.benchmark.devices.protocol import Shell, ShellDevice


def open_local(folder: str) -> ShellDevice:
    """A new folder of this machine, in ``folder``.

    Raises:
        DeviceError: it cannot be made.
    """
    shell = Shell("local", ("sh", "-c"))
    return ShellDevice(shell, shell.make_folder(folder))
