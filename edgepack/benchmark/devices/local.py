"""This machine, by the same way as any other device."""

from edgepack.benchmark.devices.protocol import Shell, ShellDevice


def open_local(folder: str) -> ShellDevice:
    """A folder of this machine in the folder ``folder``.

    Raises:
        DeviceError: it cannot be made.
    """
    shell = Shell("local", ("sh", "-c"))
    return ShellDevice(shell, shell.make_folder(folder))
