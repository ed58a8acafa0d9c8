"""Train a small net from nothing with gradients of floats, 8 and 4 bits; alone and by two workers.

    python benchmarks/tune_gradients.py SPOKEN_DIGITS.npz... [--seeds 0 1 2] [--only TEXT] [--folder KEPT]

Log-mel pictures of spoken digits (``logmel``, ``label``; the first file for training but for 700 recordings
held out, the others held out too), a LeNet-type net of 80,000 weights, Adam, one thread each. Prints a table:
the share of held-out digits that are recognized, mean and spread over seeds; what each worker sent, also as
a share of floats; and what went over the loopback device in all, headers included, which is theirs alone in a
network namespace of its own: ``unshare -rn sh -c 'ip link set lo up && python ...'``. A folder keeps the
result of each run, so that a call that was broken off goes on.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from train_nets import spoken_digits

from edgepack.config.recipe import Data, Labels
from edgepack.config.target import Runtime
from edgepack.config.training import Gradients, Tune
from edgepack.data.samples import open_samples
from edgepack.ir.arrays import Array
from edgepack.ir.files import save_model
from edgepack.ir.inputs import input_specs
from edgepack.runtime.session import open_session, run
from edgepack.training.train import TrainingRun, tune
from edgepack.training.workers import joined

NET = """<ir_version: 8, opset_import: ["" : 17]> net (float[batch, 1, 28, 28] x) => (float[batch, 10] y) {
    a = Conv (x, w1, b1)
    ar = Relu (a)
    ap = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (ar)
    c = Conv (ap, w2, b2)
    cr = Relu (c)
    cp = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (cr)
    f = Flatten (cp)
    h = Gemm <transB = 1> (f, w3, b3)
    hr = Relu (h)
    y = Gemm <transB = 1> (hr, w4, b4)
}"""
SHAPES = {"1": (16, 1, 5, 5), "2": (32, 16, 5, 5), "3": (128, 512), "4": (10, 128)}
LEARNING: dict[str, Any] = {"labels": 1.0, "logits": 0.0, "features": 0.0, "held_out": 0.0, "batch": 20}
LEARNING |= {"learning_rate": 3e-2, "budget_s": 3600.0, "threads": 1}
WAYS = {
    "floats": (1, None),
    "8 bits, block 256": (1, Gradients(bits=8)),
    "8 bits, tensor": (1, Gradients(bits=8, block=None)),
    "8 bits, tensor, nearest": (1, Gradients(bits=8, block=None, rounding="nearest", error_feedback=False)),
    "4 bits, block 256": (1, Gradients(bits=4)),
    "4 bits, tensor": (1, Gradients(bits=4, block=None)),
    "4 bits, tensor, nearest": (1, Gradients(bits=4, block=None, rounding="nearest", error_feedback=False)),
    "2 workers, floats": (2, None),
    "2 workers, 8 bits": (2, Gradients(bits=8)),
    "2 workers, 4 bits": (2, Gradients(bits=4)),
}
"""Workers and gradients. Rounding to nearest is without error feedback, all else stochastic and with it."""


def untrained(seed: int) -> ir.Model:
    """Weights as He et al. (2015) draw them."""
    rng, proto = np.random.default_rng(seed), onnx.parser.parse_model(NET)
    for number, shape in SHAPES.items():
        weight = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        # Biases start small and not at zero: what is trained is trained in groups of its own size.
        for name, array in ((f"w{number}", weight), (f"b{number}", 0.05 * rng.normal(size=shape[0]))):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(proto)


def accuracy(model: ir.Model, pictures: Array, labels: Array) -> float:
    """In onnxruntime, from the file."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model.onnx")
        session = open_session(Path(folder) / "model.onnx", Runtime())
        return float(np.mean(run(session, {"x": pictures})["y"].argmax(1) == labels))


def loopback_bytes() -> int:
    """Sent over the loopback device since the machine, or the namespace, began."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def learn(data: Path, way: str, seed: int, epochs: int) -> dict[str, Any] | None:
    """One run, or the part in it of this worker; the first has the result."""
    evaluation, model = np.load(data.with_name("held.npz")), untrained(seed)
    described = Data(path=str(data), labels=Labels(array="label"))
    samples = open_samples(described, "calibration", input_specs(model), {}, base=Path())
    steps = epochs * -(-len(samples) // int(LEARNING["batch"]))
    settings = Tune(**LEARNING, steps=steps, gradients=WAYS[way][1])
    with joined() as workers:
        before, started = loopback_bytes(), time.perf_counter()
        made = tune(model, model, samples, settings, TrainingRun(seed, workers=workers))
    sent = made.traffic
    return None if not workers.first else {
        "accuracy": accuracy(made.model, evaluation["x"], evaluation["label"]),
        "loss": made.log[-1].loss,
        "train_s": round(time.perf_counter() - started, 1),
        "sent_bytes": sent.sent_bytes if sent else 0,
        "share": sent.sent_bytes / sent.float_bytes if sent else None,
        "loopback_bytes": loopback_bytes() - before if sent else None,
    }  # fmt: skip


def learned(data: Path, way: str, seed: int, epochs: int) -> dict[str, Any]:
    """The same, all workers started; or what is known of it."""
    result = data.with_name(f"{way}, seed {seed}, epochs {epochs}.json")
    if not result.exists():
        result.write_text(json.dumps(_learned(data, way, seed, epochs)), encoding="utf-8")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    print(json.dumps({"way": way, "seed": seed, **found}), file=sys.stderr, flush=True)
    return found


def _learned(data: Path, way: str, seed: int, epochs: int) -> Any:
    count = WAYS[way][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    call = [sys.executable, __file__, "--one", str(data), way, str(seed), str(epochs)]
    workers = [
        subprocess.Popen(call, env={**os.environ, **place, "RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(count)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{way}, seed {seed}: a worker failed")
    return json.loads(outputs[0])


def row(way: str, runs: list[dict[str, Any]]) -> str:
    found = np.array([r["accuracy"] for r in runs])
    spread = f"{found.std(ddof=1):.2%}" if len(found) > 1 else ""
    cells = [way, f"{found.mean():.2%}", spread, " ".join(f"{a:.2%}" for a in found)]
    if runs[0]["share"] is None:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    over = np.mean([r["loopback_bytes"] for r in runs]) / 1e6
    return (
        f"| {' | '.join(cells)} | {runs[0]['sent_bytes'] / 1e6:.1f} | {runs[0]['share']:.4f} | {over:.1f} |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        place, chosen, seed, epochs = sys.argv[2:]
        print(json.dumps(learn(Path(place), chosen, int(seed), int(epochs))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("digits", type=Path, nargs="+", metavar="SPOKEN_DIGITS.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", default="", help="ways whose name has this text in it")
    parser.add_argument("--folder", type=Path)
    known = parser.parse_args()
    (x, y), (held_x, held_y) = spoken_digits(known.digits)
    with tempfile.TemporaryDirectory() as scratch:
        folder = known.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "digits.npz"
        np.savez(data, x=x[:, None], label=y)
        np.savez(data.with_name("held.npz"), x=held_x, label=held_y)
        heads = ["gradients", "recognized", "standard deviation", "by seed", "MB sent by each", "of floats"]
        print(f"| {' | '.join([*heads, 'MB over loopback'])} |\n{'|---' * 7}|")
        for way in WAYS:
            if known.only in way:
                runs = [learned(data, way, seed, known.epochs) for seed in known.seeds]
                print(row(way, runs), flush=True)


if __name__ == "__main__":
    main()
