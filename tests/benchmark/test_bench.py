"""Sessions and bench: order of calls, clocks, and statistics of the times."""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.onnx_models import Array, conv_net, parse, randoms

from edgepack.benchmark.bench import (
    SESSIONS,
    _ratio,
    bench,
    cold_start,
    file_ratios,
    measure,
    quick_ratios,
)
from edgepack.benchmark.environment import environment
from edgepack.config.target import Runtime
from edgepack.errors import ConfigError, ExportError, ModelError
from edgepack.ir.files import save_model
from edgepack.runtime.session import CPU, OrtRunner, open_optimized, open_session, run

ADD = "net (float[1, 4] x) => (float[1, 4] y) { y = Add (x, x) }"
FEED = {"x": np.ones((1, 4), np.float32)}


class Work:
    """A fake open model: uses CPU time, sleeps, and records its calls."""

    def __init__(
        self, name: str, log: list[tuple[str, Any]], *, busy: float = 0.0, naps: Sequence[float] = ()
    ) -> None:
        self.name, self.log, self.busy, self.naps = name, log, busy, list(naps)
        self.one_thread = True

    def prepare(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return feeds

    def call(self, feed: dict[str, Any]) -> list[Any]:
        self.log.append((self.name, feed["x"]))
        ends = time.thread_time() + self.busy
        while time.thread_time() < ends:
            pass
        if self.naps:
            self.naps.append(self.naps.pop(0))
            time.sleep(self.naps[-1])
        return []


def marked(*marks: int) -> list[dict[str, Array]]:
    """Distinct feeds."""
    return [{"x": np.asarray(mark)} for mark in marks]


@pytest.fixture
def add(tmp_path: Path) -> Path:
    path = tmp_path / "add.onnx"
    save_model(parse(ADD), path)
    return path


def test_a_session_of_a_file_and_of_bytes_compute_the_same(add: Path) -> None:
    for model in (add, add.read_bytes()):
        for lean in (False, True):
            assert run(open_session(model, Runtime(), lean=lean), FEED)["y"].tolist() == [[2, 2, 2, 2]]


def test_an_unknown_provider_is_named_with_one_that_is_there(add: Path) -> None:
    with pytest.raises(ConfigError, match="no 'CPUExecutionProvder', did you mean 'CPUExecutionProvider'"):
        open_session(add, Runtime(provider="CPUExecutionProvder"))


def test_a_model_that_the_runtime_refuses_is_named_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(
        ModelError, match=r"broken.onnx: onnxruntime refuses it: .*INVALID_PROTOBUF"
    ) as caught:
        open_session(broken, Runtime())
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="the model: onnxruntime refuses it"):
        open_session(b"no model", Runtime())


def test_settings_reach_the_runtime(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    save_model(conv_net(), path)
    off = ("ConvActivationFusion", "NchwcTransformer")
    _, fused = open_optimized(path, Runtime(), tmp_path)
    _, plain = open_optimized(path, Runtime(disabled_optimizers=off), tmp_path)
    assert "Relu" not in {node.op_type for node in fused.graph}
    assert "Relu" in {node.op_type for node in plain.graph}
    options = open_session(path, Runtime(threads=2), lean=True).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert not options.enable_cpu_mem_arena and not options.enable_mem_pattern


def test_the_optimized_graph_keeps_its_weights_in_a_file(tmp_path: Path) -> None:
    body = "net (float[1, 64] x) => (float[1, 64] y) { y = MatMul (x, w) }"
    save_model(parse(body, weights=randoms(w=(64, 64))), tmp_path / "net.onnx")
    before = (tmp_path / "net.onnx").read_bytes()
    _, optimized = open_optimized(tmp_path / "net.onnx", Runtime(), tmp_path)
    assert [node.op_type for node in optimized.graph] == ["MatMul"]
    assert isinstance(optimized.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert (tmp_path / "net.onnx").read_bytes() == before


def test_models_take_turns_on_the_same_feed_and_each_begins_a_round() -> None:
    log: list[tuple[str, Any]] = []
    # 0.8 ms a call: two calls a turn.
    sessions: list[Any] = [Work(name, log, busy=8e-4) for name in "abc"]
    rounds = measure(sessions, marked(0, 1), 6)
    turns = log[3 * len(sessions) :]  # earlier calls determine the calls per turn
    assert turns[::2] == turns[1::2]
    assert "".join(name for name, _ in turns[::2]) == "abcbcacababcbcacab"
    assert [int(x) for _, x in turns[::6]] == [0, 1, 0, 1, 0, 1]
    assert rounds.best.shape == (6, 3)
    assert [len(calls) for calls in rounds.calls] == [6, 6, 6]


def test_a_fast_model_is_called_more_often() -> None:
    log: list[tuple[str, Any]] = []
    sessions: list[Any] = [Work("fast", log), Work("slow", log, busy=3e-3)]
    rounds = measure(sessions, marked(0), 4)
    assert [len(calls) for calls in rounds.calls] == [4 * 49, 4]


def test_the_first_call_of_a_turn_is_not_among_the_latencies() -> None:
    # Three calls to determine the calls per turn, then two per turn.
    naps = [0.0, 0.0, 0.0, *([0.02, 0.0] * 20)]
    sessions: list[Any] = [Work("a", [], busy=1e-3, naps=naps)]
    calls = measure(sessions, marked(0), 5).calls[0]
    assert float(np.percentile(calls, 75)) < 0.015


def test_ratios_are_of_processor_time_where_one_thread_does_all() -> None:
    log: list[tuple[str, Any]] = []
    # The second sleeps, as if another program ran: half the CPU time, twice the wall time.
    sessions: list[Any] = [Work("a", log, busy=2e-3), Work("b", log, busy=1e-3, naps=[3e-3])]
    assert quick_ratios(sessions, marked(0), 5)[1].speedup == pytest.approx(2, rel=0.15)
    sessions[1].one_thread = False
    assert quick_ratios(sessions, marked(0), 5)[1].speedup < 0.8


def test_whether_a_session_computes_in_one_thread(add: Path) -> None:
    session = open_session(add, Runtime(threads=1))
    assert OrtRunner(session).one_thread
    assert not OrtRunner(open_session(add, Runtime(threads=2))).one_thread

    class Elsewhere:
        get_session_options = session.get_session_options

        def get_providers(self) -> list[str]:
            return ["OtherExecutionProvider", CPU]

    other: Any = Elsewhere()
    assert not OrtRunner(other).one_thread


def test_outliers_do_not_change_a_ratio_and_lasting_changes_raise_its_error() -> None:
    steady = np.full(50, 2.0)
    assert _ratio(steady) == _ratio(steady[::-1])
    assert (_ratio(steady).speedup, _ratio(steady).standard_error) == (2.0, 0.0)
    disturbed = steady.copy()
    disturbed[::5] = 40.0
    assert (_ratio(disturbed).speedup, _ratio(disturbed).standard_error) == (2.0, 0.0)
    # One of five sets of sessions is 10% faster: the interquartile range is 0, but a repeat differs.
    lasting = steady.copy()
    lasting[:10] = 2.2
    assert _ratio(lasting).standard_error == pytest.approx(0.2 / SESSIONS, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.001, 0.1), st.integers(20, 200))
def test_the_error_is_about_that_of_repeats(seed: int, spread: float, rounds: int) -> None:
    rng = np.random.default_rng(seed)
    repeats = [_ratio(1 + spread * rng.standard_normal(rounds)) for _ in range(60)]
    actual = float(np.std([r.speedup for r in repeats]))
    claimed = float(np.mean([r.standard_error for r in repeats]))
    assert 0.7 * actual < claimed < 2 * actual


def test_bench_of_files(tmp_path: Path) -> None:
    # The input has the name of an argument of numpy's savez.
    body = "net (float[1, N] file) => (float[1, N] y) { y = MatMul (file, w) }"
    paths = {}
    for name, size in (("large", 1500), ("small", 16)):
        paths[name] = tmp_path / f"{name}.onnx"
        weights = {"w": np.zeros((size, size), np.float32)}
        save_model(parse(body.replace("N", str(size)), weights=weights), paths[name])
    with pytest.raises(
        ExportError, match=r"small.onnx: cannot be run in a separate process: .*INVALID_ARGUMENT.*file"
    ):
        cold_start(paths["small"], Runtime(), {"file": np.zeros((1, 17), np.float32)})
    large = bench(
        {"first": paths["large"], "same": paths["large"]},
        Runtime(),
        [{"file": np.zeros((1, 1500), np.float32)}],
        warmup=1,
        runs=6,
    )
    small = cold_start(paths["small"], Runtime(), {"file": np.zeros((1, 16), np.float32)})
    assert list(large) == ["first", "same"]
    first, same = large.values()
    assert (first.speedup, first.speedup_error, first.runs) == (1.0, 0.0, 6)
    assert 0.5 < same.speedup < 2
    assert 0 < first.min_ms <= first.p50_ms <= first.p90_ms
    assert first.cold_start_ms is not None and first.peak_memory_bytes is not None
    assert first.cold_start_ms > first.min_ms
    # 9 MB of weights are resident at least once; the libraries do not count for a model without weights.
    assert first.peak_memory_bytes > 9e6
    assert 0 < small.memory_bytes < first.peak_memory_bytes - 5e6


def test_ratios_of_files_are_taken_over_several_sessions(add: Path) -> None:
    ratios = file_ratios([add, add], Runtime(), [FEED], 10)
    assert ratios[0].speedup == 1.0
    assert 0.5 < ratios[1].speedup < 2
    assert file_ratios([add], Runtime(), [FEED], 2)[0].speedup == 1.0


def test_the_environment_has_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment()
    text = json.dumps(found)
    assert {"cpu", "cores", "flags", "onnxruntime", "numpy", "edgepack", "load_average", "date"} <= set(found)
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert platform.node() not in found.values()


def test_a_cold_start_on_text(tmp_path: Path) -> None:
    save_model(parse("net (string[n] w) => (string[n] y) { y = Identity (w) }"), tmp_path / "words.onnx")
    words = np.asarray(["one", "three"], object)
    assert cold_start(tmp_path / "words.onnx", Runtime(), {"w": words}).milliseconds > 0


@pytest.mark.parametrize(("seconds", "runs", "expected"), [(0.0, 50, 10), (0.0, 4, 4), (1e6, 12, 12)])
def test_slow_models_take_fewer_rounds(tmp_path: Path, seconds: float, runs: int, expected: int) -> None:
    save_model(parse(ADD), tmp_path / "add.onnx")
    found = bench({"add": tmp_path / "add.onnx"}, Runtime(), [FEED], warmup=0, runs=runs, seconds=seconds)
    assert found["add"].runs == expected
