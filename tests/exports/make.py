"""Write the fixtures of this folder: tiny PyTorch models through both ONNX exporters.

Needs torch and onnxscript: ``python tests/exports/make.py``. The .onnx files are committed, so tests do not.
"""

import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

HERE = Path(__file__).parent


class Cnn(nn.Module):
    """Conv, batch norm, hard swish, a squeeze-and-excite gate, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.norm3 = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.norm(self.stem(x)))
        x = nn.functional.relu6(self.norm2(self.depthwise(nn.functional.pad(x, (1, 0, 1, 0)))))
        x = x * self.gate(x)
        x = self.norm3(self.up(x)).mean((2, 3))
        return self.head(self.drop(x))


class Attention(nn.Module):
    """A pre-norm attention block with GELU, any batch and length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        weight = ((q / 2.0) @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.out((weight @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class Lstm(nn.Module):
    """A two-way LSTM and a linear layer, any batch and length."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class Mlp(nn.Module):
    """Linear, batch norm over features, an input scaled by constants."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - self.mean) / 0.25) * 2.0


def spread(model: nn.Module) -> nn.Module:
    """Batch norms with statistics that are not those of a fresh layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2.0)
    return model.eval()


def strip(model: ir.Model) -> None:
    """Take out stack traces, which are most of the file and name folders of whoever exports."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()


def main() -> None:
    """Write all fixtures."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    models = {
        "cnn": (spread(Cnn()), torch.randn(2, 3, 16, 16), ("batch",)),
        "attention": (spread(Attention()), torch.randn(2, 5, 16), ("batch", "length")),
        "lstm": (spread(Lstm()), torch.randn(2, 5, 4), ("batch", "length")),
        "mlp": (spread(Mlp()), torch.randn(2, 4), ("batch",)),
    }
    for name, (model, x, dynamic) in models.items():
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(
            model,
            (x,),
            HERE / f"{name}_script.onnx",
            dynamo=False,
            opset_version=11 if name == "mlp" else 13,
            dynamic_axes={"x": dict(enumerate(dynamic))},
            **names,
        )
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            optimize=name != "mlp",
            verbose=False,
            dynamic_shapes=({i: torch.export.Dim(d) for i, d in enumerate(dynamic)},),
            **names,
        )
        strip(program.model)
        program.save(HERE / f"{name}_dynamo.onnx", external_data=False)


if __name__ == "__main__":
    main()
