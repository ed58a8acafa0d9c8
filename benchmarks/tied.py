"""A small language model with tied embeddings: one copy of the table in a file, beside two. Needs torch.

    python benchmarks/tied.py [FOLDER]

Trains 60 steps on the help texts of Python itself, with one weight for the first look-up and the last
product; then quantizes it in each form, as it is and with one number of the product's weight nudged, which
makes two constants of one. Times are of the CPU, one thread, the two files taking turns.
"""

import math
import pydoc_data.topics
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from edgepack.calibrate.run import calibrate
from edgepack.choose import methods_of, whole_model_methods
from edgepack.config import Calibration, Data
from edgepack.data import open_samples
from edgepack.export.compact import compact, names_of
from edgepack.measure.check import baseline, check
from edgepack.measure.fused import what_the_runtime_did
from edgepack.model import constant, input_specs, load_model, save_model, set_constant
from edgepack.normalize import normalize
from edgepack.pack.epk import pack
from edgepack.quantize.apply import apply_plan
from edgepack.quantize.plan import Method, make_plan, tensors_to_observe
from edgepack.quantize.rounding import round_weights
from edgepack.quantize.units import find_units
from edgepack.target import load_target

WORDS, WIDTH, LENGTH, HEADS = 6144, 192, 32, 6
STEPS, BATCH = 60, 16
TARGET = load_target("x86-cpu")


class Block(nn.Module):
    """A layer of a transformer, normalized first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, mask):
        """Attention and a product of two layers, each added to ``x`` [batch, LENGTH, WIDTH]."""
        parts = self.qkv(self.first(x)).reshape(-1, LENGTH, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(-1, LENGTH, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class LanguageModel(nn.Module):
    """Words to scores of the next word; one weight at both ends."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.words.weight, std=0.05)
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("mask", torch.triu(torch.full((LENGTH, LENGTH), -1e4), 1))

    def forward(self, ids):
        """Scores [batch, LENGTH, WORDS] of words [batch, LENGTH]."""
        x = self.words(ids) * 4 + self.places.weight
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


def text_ids():
    """The words of the texts as numbers, 0 for rare ones."""
    words = re.findall(r"\w+|[^\s\w]", " ".join(pydoc_data.topics.topics.values()))
    known = {word: i for i, (word, _) in enumerate(Counter(words).most_common(WORDS - 1), 1)}
    return np.array([known.get(word, 0) for word in words])


def make(folder):
    """Train and write model.onnx, calib.npz and eval.npz, whose texts differ."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids, model = text_ids(), LanguageModel()
    optimizer, rng = torch.optim.AdamW(model.parameters(), 2e-3), np.random.default_rng(0)
    end = len(ids) * 9 // 10
    for _ in range(STEPS):
        rows = np.stack([ids[a : a + LENGTH + 1] for a in rng.integers(0, end - LENGTH - 1, BATCH)])
        batch = torch.from_numpy(rows)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained {STEPS} steps, loss {float(loss):.2f}", flush=True)
    cut = [ids[a : a + LENGTH] for a in range(0, len(ids) - LENGTH, LENGTH)]
    np.savez(folder / "calib.npz", ids=np.stack(cut[: len(cut) * 9 // 10 : 80]))
    np.savez(folder / "eval.npz", ids=np.stack(cut[len(cut) * 9 // 10 :])[:60])
    example = (torch.from_numpy(cut[0][None]),)
    torch.onnx.export(model.eval(), example, folder / "model.onnx", input_names=["ids"], dynamo=False)


def forms(path, folder, nudged):
    """Files of all forms by name, each with its kernels."""
    model, _ = normalize(load_model(path), min_opset=TARGET.min_opset, max_opset=TARGET.max_opset)
    if nudged:
        product = next(n for n in reversed(list(model.graph)) if n.op_type == "MatMul")
        weight = constant(product.inputs[1]).copy()
        weight[0, 0] += 1e-3
        set_constant(model, product.inputs[1].name, weight)
    units = find_units(model, TARGET.kernels)
    samples = open_samples(
        Data(path=str(folder / "calib.npz")), "calibration", input_specs(model), {}, base=folder
    )
    ranges = calibrate(model, samples, tensors_to_observe(units), Calibration(), threads=1).ranges
    widest = make_plan(model, units, ranges, TARGET, {u.name: (Method.STATIC, "") for u in units})
    rounder = round_weights(model, widest, samples, second_order=True, threads=1, seed=0)
    found = {}
    for name, by_type in whole_model_methods(units, TARGET).items():
        methods = methods_of(units, name, by_type, {})
        plan = make_plan(model, units, ranges, TARGET, methods, rounder.smoothing)
        file = folder / f"{name} {'two' if nudged else 'one'}.onnx"
        save_model(compact(apply_plan(model, plan, rounder(plan)), names_of(model)), file)
        found[name] = file
    return found


def cpu_ms(files, feed):
    """Medians of loading and of a run, CPU time, taking turns."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    loads, runs = [[] for _ in files], [[] for _ in files]
    for _ in range(7):
        sessions = []
        for file, times in zip(files, loads, strict=True):
            started = time.process_time()
            sessions.append(ort.InferenceSession(str(file), options))
            times.append((time.process_time() - started) * 1e3)
    for _ in range(100):
        for session, times in zip(sessions, runs, strict=True):
            started = time.thread_time()
            session.run(None, feed)
            times.append((time.thread_time() - started) * 1e3)
    return [(np.median(load), np.median(run)) for load, run in zip(loads, runs, strict=True)]


def main(folder):
    """Make the model where it is not there, and print the table."""
    path = folder / "model.onnx"
    if not path.exists():
        make(folder)
    data = Data(path=str(folder / "eval.npz"))
    evaluation = open_samples(data, "evaluation", input_specs(load_model(path)), {}, base=folder)
    reference = baseline(path, evaluation, TARGET.runtime, None)
    feed = next(iter(evaluation)).feeds
    print("| form | copies | bytes | packed | dB | load, ms | run, ms | integer kernels |")
    print("|---|---|---|---|---|---|---|---|")
    one, two = forms(path, folder, False), forms(path, folder, True)
    for name in one:
        files = (two[name], one[name])
        for copies, file, (load, run) in zip((2, 1), files, cpu_ms(files, feed), strict=True):
            packed = pack(file, folder / "draft.epk", check=False).packed_bytes
            sqnr_db = check(file, evaluation, TARGET.runtime, reference, None).sqnr_db
            kernels = sum(what_the_runtime_did(file, TARGET.runtime).integer_kernels.values())
            size = f"{file.stat().st_size:,} | {packed:,}"
            print(f"| {name} | {copies} | {size} | {sqnr_db:.1f} | {load:.1f} | {run:.3f} | {kernels} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
