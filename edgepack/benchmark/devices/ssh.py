"""A device through the user's ``ssh`` program, with its configuration, agent and known hosts."""

from urllib.parse import unquote, urlsplit

from edgepack.benchmark.devices.protocol import Shell, ShellDevice
from edgepack.errors import ConfigError

LOST = 255
"""Exit code of ssh for a failed connection."""
OPTIONS = (
    *("-o", "BatchMode=yes"),  # a password prompt would wait for ever
    *("-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
)


def ssh_words(address: str) -> tuple[tuple[str, ...], str]:
    """Given ``ssh://user@host:port/folder`` / Result: the words of the command, and the folder or ``""``.

    Raises:
        ConfigError: an invalid address.
    """
    try:
        parts = urlsplit(address)
        host, port, user = parts.hostname, parts.port, unquote(parts.username or "")
    except ValueError as error:
        raise ConfigError(f"--device {address!r}: {error}") from error
    wrong = (
        "has no host" if not host
        else "has a password in it; use a key" if parts.password is not None
        else "cannot begin a name with '-'" if host.startswith("-") or user.startswith("-")
        else "has more than a folder behind the host" if parts.query or parts.fragment
        else ""
    )  # fmt: skip
    if wrong or host is None:
        raise ConfigError(f"--device {address!r} {wrong}: write ssh://user@host[:port][/folder]")
    # As spelled in the address: host names in the user's configuration may have capitals.
    named = parts.netloc.rpartition("@")[2]
    host = named[named.lower().index(host) :][: len(host)]
    where = ("-p", str(port)) if port else ()
    who = ("-l", user) if user else ()
    return ("ssh", *OPTIONS, *where, *who, "--", host), unquote(parts.path).rstrip("/")


def open_ssh(address: str) -> ShellDevice:
    """A new folder on the host, in the address's folder or ``/tmp``.

    Raises:
        ConfigError: the address is wrong.
        DeviceError: the host cannot be reached, or the folder cannot be made.
    """
    words, parent = ssh_words(address)
    shell = Shell(address, words, (LOST,))
    return ShellDevice(shell, shell.make_folder(parent or "/tmp"))
