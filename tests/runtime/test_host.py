"""Hosts that saturate, and the settings with which a model is opened there."""

import platform

import pytest

from edgepack.config.target import load_target
from edgepack.runtime import host
from edgepack.runtime.host import ExactRuntime, accuracy_notes, for_accuracy

CASES = {
    "haswell": ("x86_64", {"avx2"}, True),
    "skylake with AVX-512": ("x86_64", {"avx2", "avx512f"}, True),
    "nehalem": ("x86_64", {"ssse3"}, True),
    "windows": ("AMD64", set[str](), False),
    "ice lake": ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, False),
    "alder lake": ("x86_64", {"avx2", "avx_vnni"}, False),
    "arm": ("aarch64", {"asimd"}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_x86_without_vnni_overflows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, flags, expected = CASES[name]
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(host, "cpu", lambda: ("some processor", frozenset(flags)))
    assert host.overflows() is expected


@pytest.mark.parametrize("target", ["x86-cpu", "arm-cpu", "mobile", "web"])
def test_a_device_that_does_not_saturate_is_checked_exactly_where_the_host_does(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = load_target(target)
    monkeypatch.setattr(host, "overflows", lambda: False)
    assert for_accuracy(device) is device.runtime
    assert accuracy_notes(device) == ()
    monkeypatch.setattr(host, "overflows", lambda: True)
    exact = for_accuracy(device)
    assert isinstance(exact, ExactRuntime)
    assert exact.model_dump() == device.runtime.model_dump(), "all else stays"
    assert accuracy_notes(device) == (host.NOTE,)


@pytest.mark.parametrize("overflows", [True, False])
def test_a_device_that_saturates_is_checked_with_the_hosts_own_kernels(
    overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = load_target("x86-avx2")
    monkeypatch.setattr(host, "overflows", lambda: overflows)
    assert for_accuracy(device) is device.runtime
    assert accuracy_notes(device) == ()
