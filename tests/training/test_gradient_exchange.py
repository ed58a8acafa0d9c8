"""Gradients of low-bit weights: rounding is unbiased, nothing is lost over steps, workers stay equal."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import tiny

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import parse
from torch import Tensor

from edgepack.config.training import Gradients
from edgepack.ir.files import save_model
from edgepack.training.gradient_exchange import Exchange
from edgepack.training.gradients import Coder, lay_out, noise_of

BITS = st.sampled_from([4, 8])
BLOCKS = st.sampled_from([None, 8, 32])


def normal(size: int, seed: int, spread: float = 0.0) -> Tensor:
    """Values whose sizes differ by powers of ten."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        (rng.normal(size=size) * 10 ** (spread * rng.normal(size=size))).astype("float32")
    )


def with_gradients(sizes: list[int], values: Tensor) -> list[Tensor]:
    tensors = [torch.zeros(size, requires_grad=True) for size in sizes]
    for tensor, part in zip(tensors, values.split(sizes), strict=True):
        tensor.grad = part.clone()
    return tensors


def gradients_of(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.grad for t in tensors if t.grad is not None])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), BLOCKS, st.integers(1, 4))
def test_a_group_spans_neither_two_tensors_nor_two_parts(
    sizes: list[int], block: int | None, parts: int
) -> None:
    layout = lay_out(sizes, block, parts)
    assert layout.groups.shape[0] == parts and layout.groups.numel() >= sum(sizes)
    tensor_of = np.repeat(np.arange(len(sizes)), sizes)
    part_of = np.repeat(np.arange(parts), layout.length)[: sum(sizes)]
    groups = layout.groups.reshape(-1).numpy()[: sum(sizes)]
    seen: dict[tuple[int, int], set[int]] = {}
    for part, group, tensor in zip(part_of, groups, tensor_of, strict=True):
        seen.setdefault((part, group), set()).add(int(tensor))
        assert 0 <= group < layout.scales
    assert all(len(tensors) == 1 for tensors in seen.values())
    if block:
        _, counts = np.unique(part_of * layout.scales + groups, return_counts=True)
        assert counts.max() <= block


@given(st.integers(0, 10_000), BITS, BLOCKS)
def test_stochastic_rounding_is_unbiased(seed: int, bits: Any, block: int | None) -> None:
    """The mean of many codings comes as near to the values as the variance of their noise says."""
    many, values = 400, normal(40, seed, spread=1.0)
    settings = Gradients(bits=bits, block=block, error_feedback=False)
    coder = Coder(lay_out([30, 10], block, 1), settings)
    noise, lost = noise_of(seed, 0, 0), torch.zeros(40)
    coded = torch.stack([coder.receive(0, coder.send(0, values, lost, noise)) for _ in range(many)])
    scale = float(values.abs().max()) / (2 ** (bits - 1) - 1)
    assert ((coded - values).abs() <= scale * 1.001).all()
    # The variance of one stochastic rounding is at most a quarter of a squared step.
    error = (coded.double().mean(0) - values.double()).abs()
    assert (error <= 6 * scale / 2 / many**0.5).all()
    assert (error <= 6 * coded.double().std(0) / many**0.5 + scale / many * 20).all()
    assert not lost.any()


@given(st.integers(0, 10_000), BITS, BLOCKS, st.sampled_from(["stochastic", "nearest"]))
def test_with_error_feedback_the_sum_over_steps_is_right(
    seed: int, bits: Any, block: int | None, rounding: Any
) -> None:
    sizes, steps = [30, 1, 9], 25
    exchange = Exchange(sizes, Gradients(bits=bits, block=block, rounding=rounding), seed=seed)
    given_sum, got_sum = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for step in range(steps):
        values = normal(40, seed + step, spread=0.5)
        tensors = with_gradients(sizes, values)
        exchange(tensors, step)
        given_sum += values
        got_sum += gradients_of(tensors)
    missing = given_sum - got_sum
    assert torch.allclose(missing, exchange.lost[0][:40].double(), atol=1e-4, rtol=1e-4)


def test_without_error_feedback_small_gradients_are_lost_by_rounding_to_nearest() -> None:
    values = torch.tensor([1.0, *[0.05] * 7])
    for feedback, wanted in ((False, 0.0), (True, 0.05 * 40)):
        settings = Gradients(bits=4, block=None, rounding="nearest", error_feedback=feedback)
        exchange, total = Exchange([8], settings), torch.zeros(8)
        for step in range(40):
            tensors = with_gradients([8], values)
            exchange(tensors, step)
            total += gradients_of(tensors)
        assert total[1:] == pytest.approx(wanted, abs=0.15)


@given(BITS, BLOCKS)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(bits: Any, block: int | None) -> None:
    values = torch.cat([torch.zeros(16), torch.full((16,), torch.inf), torch.ones(16)])
    exchange = Exchange([16, 16, 16], Gradients(bits=bits, block=block))
    tensors = with_gradients([16, 16, 16], values)
    exchange(tensors, 0)
    zeros, broken, ones = (t.grad for t in tensors)
    assert not zeros.any() and not broken.isfinite().any() and torch.allclose(ones, torch.ones(16))


def test_floats_of_one_worker_are_left_alone() -> None:
    tensors = with_gradients([3], torch.tensor([1.0, 2.0, 3.0]))
    before = tensors[0].grad
    Exchange([3], None)(tensors, 0)
    assert tensors[0].grad is before


MEMBER = """
import sys
import numpy as np, torch
from edgepack.config.training import Gradients
from edgepack.training.gradient_exchange import Exchange
from edgepack.training.workers import joined

bits, folder = sys.argv[1:]
sizes = [1000, 24, 3001]
with joined() as workers:
    exchange = Exchange(sizes, Gradients(bits=int(bits)) if bits != "float" else None, workers, 5)
    given, got = np.zeros(sum(sizes)), np.zeros(sum(sizes))
    for step in range(6):
        rng = np.random.default_rng((step, workers.rank))
        tensors = [torch.zeros(n, requires_grad=True) for n in sizes]
        for tensor in tensors:
            tensor.grad = torch.from_numpy(rng.normal(size=tensor.shape).astype("float32"))
        given += torch.cat([t.grad for t in tensors]).numpy()
        exchange(tensors, step)
        got += torch.cat([t.grad for t in tensors]).numpy()
    lost = [t.numpy() for t in exchange.lost]
    np.savez(f"{folder}/{workers.rank}.npz", given=given, got=got, sent=exchange.sent_bytes,
             floats=exchange.float_bytes, **{f"lost{i}": part for i, part in enumerate(lost)})
"""


def together(count: int, command: list[str], folder: Path, **more: str) -> list[subprocess.Popen[str]]:
    """The command in ``count`` processes that find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**tiny.environment(), "LOCAL_WORLD_SIZE": str(count), **place, "RANK": str(rank), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finished(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    results = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0] * len(results), [errors[-2000:] for _, errors in results]
    return results


@pytest.mark.parametrize(
    ("count", "bits", "most"), [(3, "float", 1.0), (2, "8", 0.27), (3, "8", 0.27), (2, "4", 0.15)]
)
def test_workers_get_the_sum_of_their_gradients(tmp_path: Path, count: int, bits: str, most: float) -> None:
    finished(together(count, [sys.executable, "-c", MEMBER, bits, str(tmp_path)], tmp_path))
    results = [np.load(tmp_path / f"{rank}.npz") for rank in range(count)]
    assert all(np.array_equal(t["got"], results[0]["got"]) for t in results)
    wanted, size = sum(t["given"] for t in results), 4025
    if bits == "float":
        assert np.allclose(results[0]["got"], wanted, atol=1e-4)
    else:
        # What is missing after six steps is the quantization error that the workers still have.
        still_lost = np.zeros(count * len(results[0]["lost0"]))
        for rank, t in enumerate(results):
            still_lost += np.concatenate([t[f"lost{k}"] for k in range(count)])
            length = len(t["lost0"])
            still_lost[rank * length : (rank + 1) * length] += t[f"lost{count}"]
        assert np.allclose(wanted - results[0]["got"], still_lost[:size], atol=1e-3)
        assert np.abs(still_lost).max() > 1e-3
    assert results[0]["floats"] == 6 * (2 * (count - 1) * size * 4 // count)
    assert results[0]["sent"] <= most * results[0]["floats"]


def project(folder: Path, **gradients: Any) -> Path:
    """A recipe that trains with gradients of low-bit weights, and a model to train."""
    settings = {"steps": 24, "batch": 8, "learning_rate": 0.01, "gradients": gradients or None}
    tiny.project(folder, passes=[{"tune": settings}])
    worse = {k: v + np.float32(0.2) * np.sign(v) for k, v in tiny.weights().items()}
    save_model(parse(tiny.NET, weights=worse), folder / "worse.onnx")
    return folder


def command(output: str, run: str) -> list[str]:
    return [
        sys.executable, "-m", "edgepack", "tune", "worse.onnx", "--recipe", "edgepack.yaml",
        "--teacher", "model.onnx", "-o", output, "--checkpoints", run, "--json",
    ]  # fmt: skip


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_two_workers_train_one_model(tmp_path: Path, bits: int | None) -> None:
    folder = project(tmp_path, **({"bits": bits, "block": None} if bits else {}))
    first, second = finished(together(2, command("both.onnx", "run"), folder))
    results = json.loads(first[0])
    assert second[0] == "" and (folder / "both.onnx").exists()
    assert results["workers"]["workers"] == 2 and results["last_loss"] < results["first_loss"]
    share = results["workers"]["sent_bytes"] / results["workers"]["float_bytes"]
    assert share <= {None: 1.0, 8: 0.27, 4: 0.15}[bits]
    a, b = (content(folder / "run" / name) for name in ("checkpoint.pt", "checkpoint-1.pt"))
    assert all(torch.equal(a["tensors"][key], b["tensors"][key]) for key in a["tensors"])
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["sent_bytes"] == results["workers"]["sent_bytes"]
    if bits is None:
        # Both halves together give the step of a single worker.
        finished(together(1, command("one.onnx", "alone"), folder))
        alone = content(folder / "alone" / "checkpoint.pt")["tensors"]
        assert all(torch.allclose(a["tensors"][k], alone[k], rtol=1e-3, atol=1e-4) for k in alone)


def test_workers_with_other_settings_are_refused(tmp_path: Path) -> None:
    folder = project(tmp_path, bits=8)
    recipe = yaml.safe_load((folder / "edgepack.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump({**recipe, "seed": 9}))
    script = (
        'r=edgepack.yaml; [ "$RANK" = 1 ] && r=other.yaml; exec "$0" -m edgepack tune worse.onnx --recipe $r '
    )
    script += "--teacher model.onnx"
    processes = together(2, ["sh", "-c", script, sys.executable], folder)
    results = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [2, 2]
    assert all("worker 1 of 2 differs from worker 0" in errors for _, errors in results)


def test_half_an_environment_is_refused(tmp_path: Path) -> None:
    folder = project(tmp_path)
    (process,) = together(1, command("x.onnx", "run"), folder, WORLD_SIZE="2", MASTER_ADDR="")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "MASTER_ADDR is not set" in errors
