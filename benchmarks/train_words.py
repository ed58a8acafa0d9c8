"""Train a small language model with tied embeddings. Needs torch.

    python benchmarks/train_words.py OUT_FOLDER

60 steps on the help texts of Python itself. Writes OUT_FOLDER/{model.onnx, calib.npz, eval.npz}.
"""

import argparse
import math
import pydoc_data.topics
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

WORDS, WIDTH, LENGTH, HEADS = 6144, 192, 32, 6
STEPS, BATCH = 60, 16


class Block(nn.Module):
    """A layer of a transformer, normalized first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, mask):
        """Attention and an MLP of two layers, each added to ``x`` [batch, LENGTH, WIDTH]."""
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


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    folder = arguments.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
