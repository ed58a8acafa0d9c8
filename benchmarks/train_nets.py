"""Train a LeNet-type and a VGG-type net on real data, for benchmarks/deep_compression.py. Needs torch.

    python benchmarks/train_nets.py lenet SPOKEN_DIGITS.npz... OUT_FOLDER     log-mel of spoken digits
    python benchmarks/train_nets.py vgg CIFAR10.zip OUT_FOLDER                part/class/*.jpg

Writes OUT_FOLDER/{model.onnx, calib.npz, eval.npz, train.npz}; one thread, less than ten minutes each. With
--samples-only the net that is there stays and only train.npz is written: what a compressed net may train on.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from cifar10 import read
from onnx import TensorProto, helper, numpy_helper
from torch import nn

CALIBRATION = 512
VIEWS = {"lenet": 8, "vgg": 2}
"""Moved versions of each picture in train.npz."""
JUDGES = 10
"""One training picture in so many only judges there, and is not moved."""
MOVES = {"lenet": {"flip": 0, "shift": 2}, "vgg": {"flip": 1, "shift": 3}}
LENET_HELD_OUT = 700
"""Of the training recordings, added to the evaluation: 300 alone would hide a loss of a third of a point."""


def spoken_digits(paths):
    """Log-mel pictures, made [N, 1, 28, 28], for training and evaluation, with labels."""
    parts = [np.load(path) for path in paths]
    x = np.concatenate([part["logmel"].astype(np.float32) for part in parts])
    x = nn.functional.interpolate(torch.from_numpy(x), (28, 28), mode="area").numpy()
    y = np.concatenate([part["label"] for part in parts])
    counts = [len(part["label"]) for part in parts]
    x = (x - x[: counts[0]].mean()) / x[: counts[0]].std()
    order = np.random.default_rng(0).permutation(counts[0])
    train, evaluation = order[LENET_HELD_OUT:], order[:LENET_HELD_OUT]
    evaluation = np.concatenate([evaluation, np.arange(counts[0], len(y))])
    return (x[train], y[train]), (x[evaluation], y[evaluation])


def cifar(path):
    """Pictures [N, 3, 32, 32] for training and evaluation, with labels."""
    parts = [read(path, part) for part in ("train", "test")]
    return tuple(((x - 120) / 62, y) for x, y in parts)


def lenet():
    """LeNet-5 (LeCun et al., 1998) in the widths of Caffe's: 20, 50 and 500 groups."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(800, 500), nn.ReLU(), nn.Dropout(0.5), nn.Linear(500, 10),
    )  # fmt: skip


def vgg():
    """VGG-type (Simonyan and Zisserman, 2015): 3 × 3 convolutions, pooling, three large dense layers."""
    layers, channels = [], 3
    for width in (32, "pool", 64, "pool", 128, 128, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(2048, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))


def augmented(x, flip, shift):
    """Each picture moved by up to ``shift`` pixels, and mirrored half of the time where ``flip``."""
    padded = nn.functional.pad(x, (shift,) * 4)
    height, width = x.shape[2:]
    out = torch.empty_like(x)
    for i, (top, left) in enumerate(torch.randint(0, 2 * shift + 1, (len(x), 2)).tolist()):
        out[i] = padded[i, :, top : top + height, left : left + width]
    mirrored = torch.rand(len(x)) < 0.5 * flip
    out[mirrored] = out[mirrored].flip(3)
    return out


def train(net, x, y, epochs, rate, decay, flip, shift):
    """SGD with one cycle of the learning rate."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    batch = 64
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(net.parameters(), rate, 0.9, nesterov=True, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(epochs):
        net.train()
        started, total = time.time(), 0.0
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            loss = loss_of(net(augmented(x[rows], flip, shift)), y[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(
            f"epoch {epoch}: loss {total / (len(x) // batch):.3f}, {time.time() - started:.0f} s", flush=True
        )


def distillation(x, y, views, flip, shift):
    """Samples for ``edgepack``'s training, with labels, for ``held_out: 1 / (1 + (JUDGES - 1) * views)``.

    In their order, after so many moved pictures comes one as it is, which no other is a version of.
    """
    order = torch.randperm(len(x))
    blocks = len(x) // JUDGES
    judges, rest = order[:blocks], order[blocks : blocks * JUDGES]
    moved = torch.cat([rest[torch.randperm(len(rest))] for _ in range(views)]).reshape(blocks, -1)
    numbers = torch.cat([moved, judges[:, None]], 1)
    pictures = x[numbers.reshape(-1)].reshape(*numbers.shape, *x.shape[1:])
    pictures[:, :-1] = augmented(pictures[:, :-1].flatten(0, 1), flip, shift).reshape(pictures[:, :-1].shape)
    return pictures.flatten(0, 1).numpy(), y[numbers.reshape(-1)].numpy()


@torch.no_grad()
def accuracy(net, x, y):
    net.eval()
    scores = torch.cat([net(part) for part in torch.from_numpy(x).split(256)])
    return float((scores.argmax(1).numpy() == y).mean())


def to_onnx(net, shape, path):
    """A chain of layers as ONNX; batch normalization is left to be folded."""
    nodes, tensors, last = [], [], "x"

    def store(name, tensor):
        tensors.append(numpy_helper.from_array(tensor.detach().numpy(), name))
        return name

    for i, layer in enumerate(net):
        if isinstance(layer, nn.Dropout):
            continue
        inputs, settings = [last], {}
        if isinstance(layer, nn.Conv2d | nn.Linear):
            inputs += [store(f"w{i}", layer.weight), store(f"b{i}", layer.bias)]
        if isinstance(layer, nn.Conv2d):
            op, settings = "Conv", {"pads": list(layer.padding) * 2}
        elif isinstance(layer, nn.Linear):
            op, settings = "Gemm", {"transB": 1}
        elif isinstance(layer, nn.BatchNorm2d):
            op, settings = "BatchNormalization", {"epsilon": layer.eps}
            parts = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            inputs += [store(f"bn{i}_{j}", part) for j, part in enumerate(parts)]
        elif isinstance(layer, nn.MaxPool2d):
            op, settings = "MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}
        else:
            op = {"ReLU": "Relu", "Flatten": "Flatten"}[type(layer).__name__]
        last = f"v{i}"
        nodes.append(helper.make_node(op, inputs, [last], name=f"{op.lower()}_{i}", **settings))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, path.parent.name, [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["lenet", "vgg"])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples-only", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kind, out = arguments.kind, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (x, y), evaluation = spoken_digits(arguments.data) if kind == "lenet" else cifar(arguments.data[0])
    if not arguments.samples_only:
        make(kind, (x, y), evaluation, out)
    torch.manual_seed(1)
    pictures, labels = distillation(torch.from_numpy(x), torch.from_numpy(y), VIEWS[kind], **MOVES[kind])
    held_out = 1 / (1 + (JUDGES - 1) * VIEWS[kind])
    np.savez(out / "train.npz", x=pictures[:, None], label=labels, held_out=held_out)


def make(kind, data, evaluation, out):
    """Train a net and write it, with calibration and evaluation data."""
    (x, y), (test_x, test_y) = data, evaluation
    if kind == "lenet":
        net, settings = lenet(), {"epochs": 60, "rate": 0.03, "decay": 2e-3}
    else:
        net, settings = vgg(), {"epochs": 26, "rate": 0.05, "decay": 2e-3}
    train(net, x, y, **settings, **MOVES[kind])
    print(f"accuracy {accuracy(net, test_x, test_y):.4f} on {len(test_y)}")
    to_onnx(net, x.shape[1:], out / "model.onnx")
    some = np.random.default_rng(1).choice(len(x), CALIBRATION, replace=False)
    np.savez_compressed(out / "calib.npz", x=x[some][:, None])
    np.savez_compressed(out / "eval.npz", x=test_x[:, None], label=test_y)


if __name__ == "__main__":
    main()
