"""Filter of lines that C++ code writes to standard error."""

import os

import pytest

from edgepack.runtime.quiet_stderr import without_notes


def test_informational_lines_are_dropped_and_others_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with without_notes():
        os.write(2, b"INFO: made a delegate\nERROR: no such kernel\n")
    os.write(2, b"INFO: after\n")
    assert capfd.readouterr().err == "ERROR: no such kernel\nINFO: after\n"


def test_an_error_in_the_context_loses_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), without_notes():
        os.write(2, b"WARNING: odd file\n")
        raise ValueError("broken")
    assert capfd.readouterr().err == "WARNING: odd file\n"
