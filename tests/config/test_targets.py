"""The shipped targets, and errors in target files."""

from pathlib import Path

import pytest

from edgepack.config.target import Target, list_targets, load_target
from edgepack.errors import ConfigError
from edgepack.ir.numerics import choose_params
from edgepack.ir.scheme import QuantScheme, QuantType

SHIPPED = sorted((Path(__file__).parents[2] / "targets").glob("*.yaml"))
NAMES = [path.stem for path in SHIPPED]
MINIMAL = """\
name: board
description: a board
formats: [onnx]
kernels:
  integer: [Conv]
  same_scale: []
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A valid target file, which tests then make invalid."""
    path = tmp_path / "board.yaml"
    path.write_text(MINIMAL)
    return path


def test_the_three_targets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # not from ./targets
    monkeypatch.delenv("EDGEPACK_TARGETS", raising=False)
    assert {"arm-cpu", "mobile", "x86-cpu"} <= set(NAMES)
    assert sorted(list_targets()) == NAMES


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_a_shipped_target_is_valid_and_named_like_its_file(path: Path) -> None:
    target = load_target(str(path))
    assert target.name == path.stem
    assert target.min_opset <= target.max_opset
    assert target.gate.max_metric_drop is not None, "a shipped target guards accuracy"
    assert set(target.kernels.integer).isdisjoint(target.kernels.same_scale)


def test_the_targets_of_one_provider_have_the_same_kernels() -> None:
    tables: dict[str, list[Target]] = {}
    for path in SHIPPED:
        target = load_target(str(path))
        tables.setdefault(target.runtime.provider, []).append(target)
    for provider, targets in tables.items():
        for other in targets[1:]:
            assert other.kernels == targets[0].kernels, (
                f"{provider}: {other.name} and {targets[0].name} differ in kernels"
            )


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 6.0), (-0.37, 2.41), (-5.0, 0.0), (-3.0, 1e-3)])
def test_u8_and_s8_have_the_same_scale(low: float, high: float) -> None:
    """mobile.yaml relies on it: the stored s8 values are the u8 values minus 128."""
    u8 = choose_params(low, high, QuantScheme(QuantType.UINT8, symmetric=False))
    s8 = choose_params(low, high, QuantScheme(QuantType.INT8, symmetric=False))
    assert u8.scale == s8.scale
    assert int(u8.zero_point) == int(s8.zero_point) + 128


def test_an_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown target 'arm-cpo': did you mean 'arm-cpu'") as caught:
        load_target("arm-cpo")
    assert caught.value.exit_code == 2


def test_an_unknown_target_unlike_any_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"known: .*arm-cpu.*mobile.*x86-cpu"):
        load_target("zzzzzz")


def test_the_minimal_file_is_valid(written: Path) -> None:
    assert load_target(str(written)).quantization.activation_type is QuantType.UINT8


@pytest.mark.parametrize(
    "added, message",
    [
        ("frmats: [onnx]\n", "unknown key 'frmats', did you mean 'formats'?"),
        ("runtime: {thread: 2}\n", "unknown key 'runtime.thread', did you mean 'threads'?"),
        (
            "quantization:\n  weight_granularty: per_tensor\n",
            "unknown key 'quantization.weight_granularty', did you mean 'weight_granularity'?",
        ),
        ("gate: {max_byte: 3}\n", "unknown key 'gate.max_byte', did you mean 'max_bytes'?"),
        ("gate: {size: 3}\n", "unknown key 'gate.size', known: max_bytes, "),
        ("runtime: {threads: 0}\n", "runtime.threads: "),
        ("quantization: {weight_type: int4}\n", "quantization.weight_type: "),
        ("name: again\n", "the key 'name' is given twice"),
        ("runtime:\n  threads: 1\n  threads: 2\n", "the key 'threads' is given twice"),
    ],
)
def test_an_invalid_file_names_key_and_place(written: Path, added: str, message: str) -> None:
    written.write_text(MINIMAL + added)
    with pytest.raises(ConfigError) as caught:
        load_target(str(written))
    assert message in str(caught.value)
    assert str(written) in str(caught.value)


def test_a_missing_key_is_named(written: Path) -> None:
    written.write_text(MINIMAL.replace("formats: [onnx]\n", ""))
    with pytest.raises(ConfigError, match="the key 'formats' is missing"):
        load_target(str(written))


@pytest.mark.parametrize(
    "content, message",
    [(b"- a\n- b\n", "list"), (b"a: [\n", "not valid YAML"), (b"name: \xff\n", "cannot be read")],
)
def test_a_file_without_a_mapping_is_refused(written: Path, content: bytes, message: str) -> None:
    written.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_target(str(written))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_target(str(tmp_path / "none.yaml"))


def test_a_user_folder_takes_precedence(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written.rename(written.with_name("mobile.yaml"))
    monkeypatch.setenv("EDGEPACK_TARGETS", str(written.parent))
    assert load_target("mobile").name == "board"
