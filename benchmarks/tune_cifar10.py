"""Distillation, and three ways of making zeros, on nets of CIFAR-10: each run is one call of `tune`.

    python benchmarks/tune_cifar10.py cifar10.zip FOLDER students [--seeds 0 1 2]
    python benchmarks/tune_cifar10.py cifar10.zip FOLDER zeros [--seeds 0 1 2] [--sparsity 0.8 0.9 0.95]

students: nets of half the channels, from the same start weights and in as many steps, trained on labels
alone or to answer as the full net. zeros: the full net with L1, with L2, or with zeros that are chosen anew
on the way.

The full net is trained by train_cifar10.py on nine of ten train pictures. The tenth is for the choice of
settings: ``--part validation --only WAY KEY=VALUE...`` judges other settings by it. Seeds are those of the
start weights of students and of the order of pictures. FOLDER keeps nets and results, so that a call that was
broken off goes on. One thread each.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cifar10 import read, standardized

from edgepack.config import Data, Labels
from edgepack.config_tune import Tune
from edgepack.data import open_samples
from edgepack.measure.session import open_session, run
from edgepack.model import input_specs, load_model, save_model
from edgepack.strict import parse
from edgepack.target import Runtime
from edgepack.tune.train import tune
from edgepack.tune.weights import Kind, array_of, keys_of, trainables

FULL, HALF = ("32", "64", "96", "128"), ("16", "32", "48", "64")
VALIDATION_EVERY = 10
COMMON: dict[str, Any] = {
    "batch": 64,
    "held_out": 0.0,
    "features": 0.0,
    "level": 0.0,
    "budget_s": 7200.0,
    "threads": 1,
}
STUDENT = COMMON | {"steps": 800, "learning_rate": 3e-2}
ZEROS = COMMON | {"batch": 32, "steps": 400, "learning_rate": 5e-3, "labels": 1.0, "temperature": 4.0}
STUDENTS: dict[str, dict[str, Any]] = {
    "trained alone": {**STUDENT, "labels": 1.0, "logits": 0.0},
    "distilled": {**STUDENT, "labels": 0.5, "logits": 1.0, "temperature": 4.0},
}
WAYS: dict[str, dict[str, Any]] = {
    "L1": {**ZEROS, "l1": 1e-5, "sparsify": {"when": "once", "start": 0.1}},
    "L2": {**ZEROS, "l2": 1e-3, "sparsify": {"when": "once", "start": 0.1}},
    "dynamic": {**ZEROS, "sparsify": {"when": "dynamic", "start": 0.0, "end": 0.15, "every": 5}},
}


class Bench:
    """The pictures, and a folder with what has been made of them."""

    def __init__(self, archive: Path, folder: Path, part: str, given: dict[str, Any]) -> None:
        self.archive, self.folder, self.part, self.given = archive, folder, part, given
        folder.mkdir(parents=True, exist_ok=True)
        self.samples = folder / "train.npz"
        pictures, kinds = read(archive, "train")
        judged = np.arange(len(kinds)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
        if not self.samples.exists():
            np.savez(self.samples, image=standardized(pictures[~judged]), label=kinds[~judged])
        self.judged = {"validation": (pictures[judged], kinds[judged]), "test": read(archive, "test")}

    def net(self, name: str, widths: Sequence[str], seed: int, *more: str) -> Path:
        """A net of train_cifar10.py, made once."""
        path = self.folder / name
        if not path.exists():
            call = [sys.executable, str(Path(__file__).with_name("train_cifar10.py")), str(self.archive)]
            call += ["-o", str(path), "--seed", str(seed), "--without-every", str(VALIDATION_EVERY)]
            subprocess.run([*call, "--widths", *widths, *more], check=True, stdout=sys.stderr)
        return path

    def full(self) -> Path:
        """The trained net of all channels."""
        return self.net("full.onnx", FULL, 0)

    def accuracy(self, path: Path, part: str) -> float:
        """Of the file, in onnxruntime."""
        session = open_session(path, Runtime())
        pictures, kinds = self.judged[part]
        found = [run(session, {"image": p[None]})["scores"].argmax() for p in standardized(pictures)]
        return float(np.mean(np.equal(found, kinds)))

    def learned(
        self, name: str, start: Path, teacher: Path, settings: dict[str, Any], seed: int
    ) -> dict[str, Any]:
        """One run, or what is known of it; both parts judge it, and the one that was asked for is told."""
        chosen = parse(Tune, _merged(settings, self.given), name)
        key = hashlib.sha256(f"{seed} {chosen.model_dump_json(exclude_unset=True)}".encode()).hexdigest()[:8]
        result = self.folder / f"{name}-{seed}-{key}.json"
        if not result.exists():
            model, described = load_model(start), Data(path=str(self.samples), labels=Labels(array="label"))
            samples = open_samples(described, "calibration", input_specs(model), {}, base=Path())
            began = time.perf_counter()
            made = tune(model, load_model(teacher), samples, chosen, seed=seed)
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "tuned.onnx"
                save_model(made.model, path)
                require_same_nodes(start, path)
                facts = {part: self.accuracy(path, part) for part in self.judged}
                facts |= {"zeros": zeros_of(path), "loss": made.log[-1].loss, "steps": made.log[-1].step}
            facts["train_s"] = round(time.perf_counter() - began, 1)
            result.write_text(json.dumps(facts), encoding="utf-8")
        told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        told["accuracy"] = told[self.part]
        told = {k: v for k, v in told.items() if k not in self.judged}
        print(json.dumps({"run": name, "seed": seed, **told}), file=sys.stderr, flush=True)
        return told

    def student(self, way: str, seed: int) -> dict[str, Any]:
        """A net of half the channels; alone it has no teacher but itself, unheard."""
        start = self.net(f"start-{seed}.onnx", HALF, seed, "--untrained")
        teacher = self.full() if STUDENTS[way]["logits"] else start
        return self.learned(way, start, teacher, STUDENTS[way], seed)

    def sparse(self, way: str, sparsity: float, seed: int) -> dict[str, Any]:
        """The full net with zeros; its teacher is itself without."""
        start = self.full()
        settings = _merged(WAYS[way], {"sparsify": {"sparsity": sparsity}})
        return self.learned(f"{way}-{sparsity}", start, start, settings, seed)


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = {**settings, **more}
    if "sparsify" in settings:
        merged["sparsify"] = {**settings["sparsify"], **more.get("sparsify", {})}
    return merged


def zeros_of(path: Path) -> float:
    """Share of zeros among all weights of a file; biases do not count."""
    model = load_model(path)
    found = trainables(model)
    arrays = [array_of(v) for v, k in keys_of(model).items() if k in found and found[k].kind is Kind.WEIGHT]
    return 1 - sum(np.count_nonzero(a) for a in arrays) / sum(a.size for a in arrays)


def require_same_nodes(before: Path, after: Path) -> None:
    """End the program unless the checker passes and all nodes are those of the input, byte for byte."""
    onnx.checker.check_model(str(after), full_check=True)
    nodes = []
    for path in (before, after):
        model = onnx.ModelProto()
        model.ParseFromString(path.read_bytes())
        nodes.append([node.SerializeToString(deterministic=True) for node in model.graph.node])
    if nodes[0] != nodes[1]:
        raise SystemExit(f"{after}: nodes are not those of {before}")


def row(name: str, cells: Sequence[str], runs: Sequence[dict[str, Any]]) -> str:
    found = np.array([r["accuracy"] for r in runs])
    spread = f"{found.std(ddof=1):.2%}" if len(found) > 1 else ""
    told = [f"{found.mean():.2%}", spread, " ".join(f"{a:.2%}" for a in found)]
    return f"| {' | '.join([name, *cells, *told])} |"


def students(bench: Bench, only: str, seeds: list[int]) -> None:
    print("| student | accuracy | standard deviation | by seed |\n|---|---|---|---|")
    ways = [way for way in STUDENTS if only in way]
    found = {way: [bench.student(way, seed) for seed in seeds] for way in ways}
    print(row("(the full net)", [], [{"accuracy": bench.accuracy(bench.full(), bench.part)}]))
    for way, runs in found.items():
        print(row(way, [], runs))
    if len(found) == len(STUDENTS):
        pairs = zip(*found.values(), strict=True)
        gains = [{"accuracy": b["accuracy"] - a["accuracy"]} for a, b in pairs]
        print(row("gain", [], gains))


def zeros(bench: Bench, only: str, seeds: list[int], rates: list[float]) -> None:
    print("| way | wanted | zeros | accuracy | standard deviation | by seed |\n|---|---|---|---|---|---|")
    print(row("(dense)", ["", "0.00%"], [{"accuracy": bench.accuracy(bench.full(), bench.part)}]))
    for rate in rates:
        for way in WAYS:
            if only in way:
                runs = [bench.sparse(way, rate, seed) for seed in seeds]
                share = np.mean([r["zeros"] for r in runs])
                print(row(way, [f"{rate:.0%}", f"{share:.2%}"], runs), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["students", "zeros"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--only", default="", help="ways whose name has this text in it")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    known = parser.parse_intermixed_args()
    given: dict[str, Any] = {}
    for key, value in (pair.split("=", 1) for pair in known.settings):
        head, _, inner = key.partition(".")
        given[head] = {**given.get(head, {}), inner: value} if inner else value
    bench = Bench(known.archive, known.folder, known.part, given)
    if known.what == "students":
        students(bench, known.only, known.seeds)
    else:
        zeros(bench, known.only, known.seeds, known.sparsity)
    print(
        f"\nAll {known.what}: every node byte for byte that of the input, onnx.checker and onnxruntime pass."
    )


if __name__ == "__main__":
    main()
