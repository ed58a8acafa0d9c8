"""How the program starts and ends: signals, messages, exit codes."""

import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from edgepack.cli.common import app
from edgepack.errors import EdgepackError, GateFailed

STOPPING = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Entry point: runs the command line; an edgepack error gives one message and its exit code."""
    for number in STOPPING:
        signal.signal(number, _stop)
    sys.exit(run(app))


class Stopped(BaseException):
    """A signal to stop, as an exception, so that all contexts clean up."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> None:
    for other in STOPPING:  # a second Ctrl-C must not interrupt the cleanup
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


DEFECT = 70
"""Exit code of a defect (EX_SOFTWARE); 1 means that the gate was not met."""


def run(command: Callable[[], None]) -> int:
    """The exit code of ``command``."""
    try:
        command()
    except EdgepackError as error:
        label = "gate" if isinstance(error, GateFailed) else "error"
        print(f"edgepack: {label}: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stop:
        print("edgepack: stopped; no partial files are left", file=sys.stderr)
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception:  # noqa: BLE001  # the traceback is shown, with its own exit code
        traceback.print_exc()
        print("edgepack: this is a defect in edgepack, not in your model or data", file=sys.stderr)
        return DEFECT
    return 0
