"""Metrics of the suite's tasks that are not built in: detection and text reading."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Outputs = Sequence[dict[str, Array]]

CLASSES = 80
IOU = 0.5
NMS_IOU = 0.45
MIN_SCORE = 0.01


def mean_average_precision_50(outputs: Outputs, labels: Sequence[Any]) -> float:
    """mAP at IoU 0.5, averaged over 101 recalls (COCO) and over the classes that occur.

    Labels: per image, rows with one cell ``class cx cy w h`` relative to the image.
    """
    truth = [
        np.array([[float(c) for c in row[0].split()] for row in label]).reshape(-1, 5) for label in labels
    ]
    found = [detections(next(iter(o.values()))[0]) for o in outputs]
    scores = []
    for c in range(CLASSES):
        boxes = [_corners(t[t[:, 0] == c, 1:]) for t in truth]
        total = sum(len(b) for b in boxes)
        if total:
            scores.append(_average_precision(boxes, [f[f[:, 5] == c] for f in found], total))
    return float(np.mean(scores))


def detections(grid: Array) -> Array:
    """Rows ``x1 y1 x2 y2 score class`` of a FastestDet grid [5 + classes, H, W], after NMS per class."""
    _, height, width = grid.shape
    classes = grid[5:]
    score = grid[0] ** 0.6 * classes.max(0) ** 0.4
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    center = np.stack([(column + np.tanh(grid[1])) / width, (row + np.tanh(grid[2])) / height], -1)
    size = 1 / (1 + np.exp(-np.stack([grid[3], grid[4]], -1)))
    boxes = np.concatenate([center - size / 2, center + size / 2], -1).reshape(-1, 4)
    rows = np.column_stack([boxes, score.ravel(), classes.argmax(0).ravel()])
    rows = rows[np.nan_to_num(rows[:, 4]) > MIN_SCORE]
    rows = rows[np.argsort(-rows[:, 4])]
    kept = []
    while len(rows):
        best, rest = rows[0], rows[1:]
        kept.append(best)
        overlap = intersection_over_union(best[None, :4], rest[:, :4])[0]
        rows = rest[(overlap <= NMS_IOU) | (rest[:, 5] != best[5])]
    return np.array(kept).reshape(-1, 6)


def _corners(boxes: Array) -> Array:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


def intersection_over_union(a: Array, b: Array) -> Array:
    """``[len(a), len(b)]`` of boxes ``x1 y1 x2 y2``."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    return np.asarray(inside / (area_a[:, None] + area_b[None] - inside + 1e-9))


def _average_precision(truth: list[Array], found: list[Array], total: int) -> float:
    rows = sorted(((r[4], i, r[:4]) for i, rs in enumerate(found) for r in rs), key=lambda x: -x[0])
    if not rows:
        return 0.0
    used: set[tuple[int, int]] = set()
    hits = np.zeros(len(rows))
    for k, (_, image, box) in enumerate(rows):
        overlap = intersection_over_union(box[None], truth[image])[0]
        for j in np.argsort(-overlap):
            if overlap[j] < IOU:
                break
            if (image, int(j)) not in used:
                used.add((image, int(j)))
                hits[k] = 1
                break
    right = np.cumsum(hits)
    recall = right / total
    precision = right / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = np.concatenate([[0], recall, [recall[-1] + 1e-6, 1]])
    precision = np.concatenate([[precision[0]], precision, [0, 0]])
    return float(np.interp(np.linspace(0, 1, 101), recall, precision).mean())


def character_accuracy(outputs: Outputs, labels: Sequence[str]) -> float:
    """One minus the edit distance per character of text read by greedy CTC decoding."""
    alphabet = ["", *_alphabet(), " "]
    wrong = total = 0
    for output, text in zip(outputs, labels, strict=True):
        best = next(iter(output.values()))[0].argmax(-1)
        picked = [c for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1])]
        wrong += edit_distance("".join(alphabet[c] for c in picked).strip(), text)
        total += len(text)
    return 1 - wrong / total


def _alphabet() -> list[str]:
    import onnx_ir as ir  # noqa: PLC0415

    model = ir.load(Path(os.environ["EDGEPACK_SUITE"]) / "ppocrv4_rec" / "model.onnx")
    return model.metadata_props["character"].splitlines()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein (1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
