"""Distillation, ways of making zeros, and of doing with fewer channels, on nets of CIFAR-10.

    python benchmarks/tune_cifar10.py cifar10.zip FOLDER students [--seeds 0 1 2]
    python benchmarks/tune_cifar10.py cifar10.zip FOLDER zeros [--seeds 0 1 2] [--sparsity 0.8 0.9 0.95]
    python benchmarks/tune_cifar10.py cifar10.zip FOLDER channels [--seeds 0 1 2] [--sparsity 0.3 0.5]

students: nets of half the channels, from the same start weights and in as many steps, trained on labels
alone or on the outputs of the full net. zeros: the full net with L1, with L2, or with masks that are updated
on the way. channels: the full net without channels that were taken out on the way, against group lasso,
removal of as much work by GPTQ, and training again, in as many steps.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from cifar10 import read, standardized

from edgepack.compression.channel_choice import Costs
from edgepack.compression.channels.rules import find_channels
from edgepack.compression.compact import compact
from edgepack.compression.pass_inputs import some_samples
from edgepack.compression.structured import Multiples, prune_structured
from edgepack.config.passes import Compact, Structured
from edgepack.config.recipe import Data, Labels
from edgepack.config.strict_yaml import parse
from edgepack.config.target import Runtime
from edgepack.config.training import Tune
from edgepack.data.samples import Samples, open_samples
from edgepack.graph.normalize import normalize
from edgepack.ir.files import load_model, save_model
from edgepack.ir.inputs import input_specs
from edgepack.runtime.session import open_session, run
from edgepack.training.train import TrainingRun, tune
from edgepack.training.weights import Kind, array_of, keys_of, trainables

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
    "dynamic": {**ZEROS, "sparsify": {"start": 0.0, "end": 0.15, "every": 5, "regrowth": "straight_through"}},
    "dynamic, by gradient": {
        **ZEROS,
        "sparsify": {"start": 0.0, "end": 0.4, "every": 20, "regrowth": "gradient"},
    },
}
SLIM = ZEROS | {"steps": 200}
CHANNELS: dict[str, dict[str, Any]] = {
    "dynamic": {**SLIM, "sparsify": {"pattern": "channels", "start": 0.0, "end": 0.4, "every": 5}},
    "group lasso, then removal": {**SLIM, "steps": 100, "group_lasso": 1e-3},
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

    def known(
        self, name: str, seed: int, settings: Any, make: Callable[[], ir.Model], **more: Any
    ) -> dict[str, Any]:
        """Run once, or return the stored result; both splits are evaluated, the requested one is returned."""
        key = hashlib.sha256(f"{seed} {json.dumps(settings)}".encode()).hexdigest()[:8]
        result = self.folder / f"{name}-{seed}-{key}.json"
        if not result.exists():
            began = time.perf_counter()
            model = make()
            took = round(time.perf_counter() - began, 1)
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "tuned.onnx"
                save_model(model, path)
                onnx.checker.check_model(str(path), full_check=True)
                facts = {part: self.accuracy(path, part) for part in self.judged}
                facts |= {"zeros": zeros_of(path), "macs": self.macs(path), "train_s": took}
            result.write_text(json.dumps(facts), encoding="utf-8")
        outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        outcome["accuracy"] = outcome[self.part]
        outcome = {k: v for k, v in outcome.items() if k not in self.judged}
        print(json.dumps({"run": name, "seed": seed, **outcome}), file=sys.stderr, flush=True)
        return outcome

    def macs(self, path: Path) -> int:
        """Multiplications of a file for one picture."""
        model = normalized(load_model(path))
        found = find_channels(model)
        return Costs(model, found, self.opened(model), 1).macs(np.ones(len(found.parents), np.bool_))

    def opened(self, model: ir.Model) -> Samples:
        """The pictures to learn from."""
        described = Data(path=str(self.samples), labels=Labels(array="label"))
        return open_samples(described, "training", input_specs(model), {}, base=Path())

    def tuned(self, start: ir.Model, teacher: Path, settings: dict[str, Any], seed: int) -> ir.Model:
        """``start`` after training; its nodes are the same to the byte."""
        chosen = parse(Tune, _merged(settings, self.given), "settings")
        made = tune(start, load_model(teacher), self.opened(start), chosen, TrainingRun(seed)).model
        require_same_nodes(start, made)
        return made

    def student(self, way: str, seed: int) -> dict[str, Any]:
        """A net of half the channels; alone it has no teacher but itself, unheard."""
        start = self.net(f"start-{seed}.onnx", HALF, seed, "--untrained")
        teacher, settings = self.full() if STUDENTS[way]["logits"] else start, STUDENTS[way]
        used = _merged(settings, self.given)
        return self.known(way, seed, used, lambda: self.tuned(load_model(start), teacher, settings, seed))

    def sparse(self, way: str, sparsity: float, seed: int) -> dict[str, Any]:
        """The full net with zeros; its teacher is itself without."""
        start, settings = self.full(), _merged(WAYS[way], {"sparsify": {"sparsity": sparsity}})
        used = _merged(settings, self.given)
        return self.known(
            f"{way}-{sparsity}", seed, used, lambda: self.tuned(load_model(start), start, settings, seed)
        )

    def slim(self, way: str, sparsity: float, seed: int) -> dict[str, Any]:
        """The full net without some channels."""
        start, settings = self.full(), CHANNELS[way]
        if "sparsify" in settings:
            asked = _merged(settings, {"sparsify": {"sparsity": sparsity}})

            def dynamic() -> ir.Model:
                masked = self.tuned(normalized(load_model(start)), start, asked, seed)
                return compact(masked, Compact(multiple=1), Multiples())[0]

            return self.known(f"{way}-{sparsity}", seed, _merged(asked, self.given), dynamic)
        # As many multiplications as the other way left, in as many steps, half of them afterwards.
        macs = self.slim(next(iter(CHANNELS)), sparsity, seed)["macs"] / self.macs(start)
        after = {k: v for k, v in settings.items() if k != "group_lasso"}

        def removed() -> ir.Model:
            drawn = self.tuned(normalized(load_model(start)), start, settings, seed)
            config, some = Structured(macs=macs, multiple=1), some_samples(self.opened(drawn))
            less, _ = prune_structured(drawn, some, config, Multiples(), threads=1, seed=seed)
            return self.tuned(less, start, after, seed)

        return self.known(f"{way}-{sparsity}", seed, [macs, _merged(settings, self.given)], removed)


def normalized(model: ir.Model) -> ir.Model:
    """The model as passes get it."""
    return normalize(model, min_opset=13, max_opset=21)[0]


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


def require_same_nodes(before: ir.Model, after: ir.Model) -> None:
    """End the program unless all nodes are those of the model before, byte for byte."""
    nodes = [
        [node.SerializeToString(deterministic=True) for node in ir.to_proto(model).graph.node]
        for model in (before, after)
    ]
    if nodes[0] != nodes[1]:
        raise SystemExit("training has changed nodes")


def row(name: str, cells: Sequence[str], runs: Sequence[dict[str, Any]]) -> str:
    found = np.array([r["accuracy"] for r in runs])
    spread = f"{found.std(ddof=1):.2%}" if len(found) > 1 else ""
    figures = [f"{found.mean():.2%}", spread, " ".join(f"{a:.2%}" for a in found)]
    return f"| {' | '.join([name, *cells, *figures])} |"


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


def channels(bench: Bench, only: str, seeds: list[int], rates: list[float]) -> None:
    head = ["way", "channels out", "multiplications left", "accuracy", "standard deviation", "by seed"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    whole = bench.macs(bench.full())
    print(row("(all channels)", ["0%", "100.0%"], [{"accuracy": bench.accuracy(bench.full(), bench.part)}]))
    for rate in rates:
        for way in CHANNELS:
            if only in way:
                runs = [bench.slim(way, rate, seed) for seed in seeds]
                left = np.mean([r["macs"] for r in runs]) / whole
                print(row(way, [f"{rate:.0%}", f"{left:.1%}"], runs), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["students", "zeros", "channels"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+")
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
    elif known.what == "zeros":
        zeros(bench, known.only, known.seeds, known.sparsity or [0.8, 0.9, 0.95])
    else:
        channels(bench, known.only, known.seeds, known.sparsity or [0.3, 0.5])
    print(
        f"\nAll {known.what}: every node byte for byte that of the input, onnx.checker and onnxruntime pass."
    )


if __name__ == "__main__":
    main()
