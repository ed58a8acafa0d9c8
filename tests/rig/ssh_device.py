"""A device to reach by ssh: sshd on loopback, whose ``python3`` is that of the aarch64 root under qemu.

``python tests/rig/ssh_device.py --install`` unpacks Debian's openssh-server into the cache folder; nothing is
installed or started, and the machine's own ssh is not touched. A device lives in a mount namespace of its own
with keys and configuration of its own, so that it needs root.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from rig.arm import PYTHON, QEMU, cache_folder, guest_environment, root_folder

PACKAGES = ("openssh-server", "libwrap0")
USER = "root"
FULL = "full"
"""A folder of the device with room for 4 kB."""


def unpacked() -> Path:
    """Where Debian's packages are unpacked, or will be."""
    return cache_folder() / "openssh-server"


def missing() -> str:
    """What to do before there can be a device; empty when all is there."""
    if os.geteuid() != 0:
        return "a device by ssh has a mount namespace of its own: run as root"
    lacking = [program for program in ("ssh", "ssh-keygen", "unshare") if not shutil.which(program)]
    if lacking:
        return f"no {', '.join(lacking)} (Debian: openssh-client, util-linux)"
    return "" if unpacked().is_dir() else "no sshd: run `python tests/rig/ssh_device.py --install`"


def install() -> Path:
    """Unpack the packages, once. A failed attempt leaves nothing behind."""
    if not unpacked().is_dir():
        unpacked().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked().parent, prefix="making-") as scratch:
            made = Path(scratch) / "root"
            download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *PACKAGES]
            subprocess.run(download, check=True, stdout=sys.stderr, cwd=scratch)
            for package in Path(scratch).glob("*.deb"):
                subprocess.run(["dpkg-deb", "--extract", str(package), str(made)], check=True)
            made.rename(unpacked())
    return unpacked()


@dataclass(frozen=True, slots=True)
class SshDevice:
    """A running device."""

    address: str
    folder: Path
    """What it calls the folder to work in; on this machine it has the same name."""
    programs: Path
    """A folder for ``PATH``: its ``ssh`` has the configuration of this device alone."""
    bare_python: str
    """A Python of the device that has no onnxruntime."""
    sshd: "subprocess.Popen[bytes]"

    def cut(self) -> None:
        """End all connections, as when a cable is pulled."""
        for pid in _children(self.sshd.pid):
            os.kill(pid, 9)


@contextmanager
def ssh_device(scratch: Path, core: str) -> Iterator[SshDevice]:
    """A device with the emulated ``core``, in the folder ``scratch``; it is gone in the end."""
    programs, work = scratch / "bin", scratch / "work"
    for folder in (programs, work, scratch / FULL):
        folder.mkdir()
    emulated_python(scratch)
    bare = emulated_python(scratch, without="PYTHONPATH")
    port = _free_port()
    _write_keys(scratch)
    _write_settings(scratch, core, port)
    libraries = ":".join(str(path) for path in unpacked().glob("usr/lib/*-linux-gnu"))
    # sshd wants a user and a folder of its own: they are there in its namespace alone.
    (scratch / "passwd").write_text(
        Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    start = (
        'mount --bind "$1/passwd" /etc/passwd && mount -t tmpfs none /run && mkdir -m 755 /run/sshd'
        ' && mount -t tmpfs -o size=4k none "$1/full" && exec "$2" -D -e -f "$1/sshd_config"'
    )
    with (scratch / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", start, "sh", scratch, unpacked() / "usr/sbin/sshd"],
            stderr=log,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
        )
    try:
        _wait_until_it_listens(port, sshd, scratch)
        address = f"ssh://{USER}@device:{port}{work}"
        yield SshDevice(address, work, programs, str(bare), sshd)
    finally:
        for pid in [*_children(sshd.pid), sshd.pid]:
            os.kill(pid, 9)
        sshd.wait()


def emulated_python(folder: Path, *, without: str = "") -> Path:
    """Write ``folder/device-bin/python3``, the root's Python under qemu.

    ``without``: a variable of its environment to leave out; the program is then in ``folder/bare``.
    """
    root = root_folder()
    program = folder / ("bare" if without else "device-bin") / "python3"
    program.parent.mkdir()
    settings = {k: v for k, v in guest_environment(root).items() if k not in (without, "PATH")}
    lines = [f"export {key}='{value}'" for key, value in settings.items()]
    python = root / "usr" / "bin" / f"python{PYTHON}"
    # Python takes its own name from argument 0: what it starts is then emulated, too.
    run = f'exec {shutil.which(QEMU)} -L {root} -0 "$0" {python} "$@"\n'
    program.write_text("\n".join(["#!/bin/sh", *lines, run]))
    program.chmod(0o755)
    return program


def _write_keys(scratch: Path) -> None:
    for name in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(scratch / name)]
        subprocess.run(make, check=True)


def _write_settings(scratch: Path, core: str, port: int) -> None:
    server = {
        "ListenAddress": "127.0.0.1", "Port": port, "HostKey": scratch / "host", "PidFile": "none",
        "AuthorizedKeysFile": scratch / "user.pub", "StrictModes": "no", "UsePAM": "no",
        "AuthenticationMethods": "publickey", "PermitRootLogin": "prohibit-password",
        # Not SetEnv: the shell's own files may set another PATH.
        "ForceCommand": f"PATH={scratch}/device-bin:/usr/bin:/bin QEMU_CPU={core}"
        ' sh -c "$SSH_ORIGINAL_COMMAND"',
    }  # fmt: skip
    (scratch / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
    public = (scratch / "host.pub").read_text()
    (scratch / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")
    client = {
        "HostName": "127.0.0.1", "IdentityFile": scratch / "user", "IdentitiesOnly": "yes",
        "UserKnownHostsFile": scratch / "known_hosts", "StrictHostKeyChecking": "yes",
    }  # fmt: skip
    (scratch / "config").write_text("Host device\n" + "".join(f"  {k} {v}\n" for k, v in client.items()))
    program = scratch / "bin" / "ssh"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {scratch / "config"} "$@"\n')
    program.chmod(0o755)


def _wait_until_it_listens(port: int, sshd: "subprocess.Popen[bytes]", scratch: Path) -> None:
    for _ in range(200):
        if sshd.poll() is not None:
            raise RuntimeError((scratch / "sshd.log").read_text())
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("sshd does not listen")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _children(pid: int) -> list[int]:
    """Processes that ``pid`` started and that still run."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def main() -> int:
    """Unpack what is needed, and write its path to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", required=True)
    parser.parse_args()
    sys.stdout.write(f"{install()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
