"""A device for Debian's ``adb``: a server of the debug bridge on loopback that runs what it is told for real.

It speaks the part of the protocol that the client needs: the greeting without a key, ``shell`` in its second
version (standard input, both outputs, exit code) and ``sync`` with SEND, RECV, STAT and QUIT. Source: Android
Open Source Project, packages/modules/adb, protocol.txt and SYNC.TXT. ``/data/local/tmp`` is a folder given at
the start.
"""

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

VERSION, MOST_BYTES = 0x01000000, 4096
BANNER = b"device::ro.product.name=rig;ro.product.model=rig;ro.product.device=rig;features=shell_v2,cmd\0"
STDIN, STDOUT, STDERR, EXIT = range(4)
TEMPORARY = "/data/local/tmp"


def packet(name: bytes, first: int, second: int, content: bytes = b"") -> bytes:
    """One message of the bridge."""
    (number,) = struct.unpack("<I", name)
    head = struct.pack(
        "<6I", number, first, second, len(content), sum(content) & 0xFFFFFFFF, number ^ 0xFFFFFFFF
    )
    return head + content


@dataclass(slots=True)
class Stream:
    """One opened service: bytes that came, and leave to send more."""

    own: int
    other: int
    received: bytearray = field(default_factory=bytearray)
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    ready: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.received) >= count or self.closed)
            found = bytes(self.received[:count])
            del self.received[:count]
            return found

    def put(self, content: bytes, *, last: bool = False) -> None:
        """What the client sent, or that it sends no more."""
        with self.changed:
            self.received += content
            self.closed |= last
            self.changed.notify_all()


class Connection(threading.Thread):
    """A client, and the services that it opened."""

    def __init__(self, wire: socket.socket, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__(daemon=True)
        self.wire, self.folder, self.environment = wire, folder, dict(environment)
        self.streams: dict[int, Stream] = {}
        self.sending = threading.Lock()

    def run(self) -> None:
        """Take messages until the client is gone."""
        try:
            while True:
                name, first, second, size, _, _ = struct.unpack("<4s5I", self._exactly(24))
                self._answer(name, first, second, self._exactly(size))
        except (EOFError, OSError):
            self.wire.close()
            for stream in self.streams.values():
                stream.put(b"", last=True)

    def _answer(self, name: bytes, first: int, second: int, content: bytes) -> None:
        stream = self.streams.get(second)
        if name == b"CNXN":
            self._send(packet(b"CNXN", VERSION, MOST_BYTES, BANNER))
        elif name == b"OPEN":
            self._open(first, content.rstrip(b"\0").decode())
        elif stream and name == b"OKAY":
            stream.ready.release()
        elif stream and name == b"WRTE":
            stream.put(content)
            self._send(packet(b"OKAY", second, first))
        elif stream and name == b"CLSE":
            stream.put(b"", last=True)

    def _open(self, other: int, service: str) -> None:
        stream = Stream(len(self.streams) + 1, other)
        kind, _, rest = service.partition(":")
        work = {"shell": self._shell, "sync": self._sync}.get(kind.partition(",")[0])
        if work is None:
            self._send(packet(b"CLSE", 0, other))
            return
        self.streams[stream.own] = stream
        self._send(packet(b"OKAY", stream.own, other))
        threading.Thread(target=work, args=(stream, rest), daemon=True).start()

    def _shell(self, stream: Stream, command: str) -> None:
        command = command.replace(TEMPORARY, str(self.folder))
        running = subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.environment,
        )  # fmt: skip
        threading.Thread(target=_feed, args=(stream, running), daemon=True).start()
        outputs = [
            threading.Thread(target=self._tell, args=(stream, kind, pipe))
            for kind, pipe in ((STDOUT, running.stdout), (STDERR, running.stderr))
        ]
        for thread in outputs:
            thread.start()
        for thread in outputs:
            thread.join()
        for pipe in (running.stdout, running.stderr):
            pipe.close()  # type: ignore[union-attr]  # they are pipes
        self._write(stream, struct.pack("<BIB", EXIT, 1, running.wait() & 255))
        self._send(packet(b"CLSE", stream.own, stream.other))

    def _tell(self, stream: Stream, kind: int, pipe: "object") -> None:
        while content := os.read(pipe.fileno(), 2048):  # type: ignore[attr-defined]
            self._write(stream, struct.pack("<BI", kind, len(content)) + content)

    def _sync(self, stream: Stream, _: str) -> None:
        while len(head := stream.take(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"QUIT":
                break
            path = stream.take(size).decode()
            if name == b"SEND":
                self._receive(stream, self._real(path.rpartition(",")[0]))
            elif name == b"RECV":
                self._give(stream, self._real(path))
            elif name == b"STAT":
                self._write(stream, b"STAT" + _facts(self._real(path)))
        self._send(packet(b"CLSE", stream.own, stream.other))

    def _receive(self, stream: Stream, path: Path) -> None:
        """A file in pieces, DONE at its end; a reason where it cannot be written."""
        reason = ""
        with path.open("wb") as file:
            while True:
                name, size = struct.unpack("<4sI", stream.take(8))
                if name != b"DATA":
                    break
                try:
                    file.write(stream.take(size))
                    file.flush()
                except OSError as error:
                    reason = error.strerror or "error"
        answer = b"FAIL" if reason else b"OKAY"
        self._write(stream, answer + struct.pack("<I", len(reason)) + reason.encode())

    def _give(self, stream: Stream, path: Path) -> None:
        if not path.is_file():
            self._write(stream, b"FAIL" + struct.pack("<I", 7) + b"no file")
            return
        content = path.read_bytes()
        for start in range(0, len(content), 65536):
            piece = content[start : start + 65536]
            self._write(stream, b"DATA" + struct.pack("<I", len(piece)) + piece)
        self._write(stream, b"DONE" + struct.pack("<I", 0))

    def _real(self, path: str) -> Path:
        return Path(path.replace(TEMPORARY, str(self.folder)))

    def _write(self, stream: Stream, content: bytes) -> None:
        for start in range(0, len(content), MOST_BYTES):
            self._send(packet(b"WRTE", stream.own, stream.other, content[start : start + MOST_BYTES]))
            stream.ready.acquire(timeout=30)

    def _send(self, content: bytes) -> None:
        with self.sending:
            self.wire.sendall(content)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = self.wire.recv(count - len(found))
            if not piece:
                raise EOFError
            found += piece
        return found


def _feed(stream: Stream, running: "subprocess.Popen[bytes]") -> None:
    """Standard input of a command, as packets of the shell's protocol."""
    assert running.stdin
    while len(head := stream.take(5)) == 5:
        kind, size = struct.unpack("<BI", head)
        content = stream.take(size)
        if kind != STDIN:
            break
        with suppress(BrokenPipeError):
            running.stdin.write(content)
            running.stdin.flush()
    with suppress(BrokenPipeError):
        running.stdin.close()


def _facts(path: Path) -> bytes:
    try:
        found = path.stat()
    except OSError:
        return struct.pack("<3I", 0, 0, 0)
    return struct.pack("<3I", found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime))


@contextmanager
def adb_device(folder: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """Serve on a free port of loopback; commands have ``environment``."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def accept() -> None:
            try:
                while True:
                    Connection(listening.accept()[0], folder, environment).start()
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
