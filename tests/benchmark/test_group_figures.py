"""Times and errors by group."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.onnx_models import conv_net, parse

from edgepack.benchmark.group_figures import group_errors
from edgepack.config.recipe import Data
from edgepack.config.target import load_target
from edgepack.data.samples import Samples, open_samples
from edgepack.ir.inputs import InputSpec, input_specs
from edgepack.ir.model import clone, set_constant
from edgepack.quantization.groups import find_fusion_groups

KERNELS = load_target("x86-cpu").kernels


def named(model: ir.Model) -> ir.Model:
    """The model with a name for each node, as after normalization."""
    for index, node in enumerate(model.graph):
        node.name = f"node{index}"
    return model


def open_random(folder: Path, inputs: Sequence[InputSpec], shape: tuple[int, ...]) -> Samples:
    np.savez(folder / "x.npz", x=np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32))
    return open_samples(Data(path=str(folder / "x.npz")), "evaluation", inputs, {}, base=folder)


def test_equal_models_have_no_error(tmp_path: Path) -> None:
    model = named(conv_net())
    samples = open_random(tmp_path, input_specs(model), (1, 3, 8, 8))
    errors = group_errors(model, clone(model), find_fusion_groups(model, KERNELS), samples, threads=1)
    assert errors
    assert set(errors.values()) == {float("inf")}


def test_an_error_appears_where_it_is_made(tmp_path: Path) -> None:
    body = """net (float[1, 4] x) => (float[1, 4] y) {
        a = MatMul (x, w1)
        b = MatMul (a, w2)
        y = MatMul (b, w3)
    }"""
    model = parse(body, weights={name: np.eye(4, dtype=np.float32) for name in ("w1", "w2", "w3")})
    for node, name in zip(model.graph, ("first", "second", "third"), strict=True):
        node.name = name
    worse = clone(model)
    set_constant(worse, "w2", np.eye(4, dtype=np.float32) * np.float32(1.1))
    samples = open_random(tmp_path, input_specs(model), (1, 4))
    errors = group_errors(model, worse, find_fusion_groups(model, KERNELS), samples, threads=1)
    assert errors["first"] == float("inf")
    assert errors["second"] == pytest.approx(20, abs=0.01)  # a tenth of the signal
    assert errors["third"] == pytest.approx(20, abs=0.01)


def test_a_value_is_compared_as_its_consumers_get_it(tmp_path: Path) -> None:
    model = named(parse("net (float[1, 4] x) => (float[1, 4] y) { a = Relu (x)  y = Neg (a) }"))
    built = parse("""net (float[1, 4] x) => (float[1, 4] y) {
        s = Constant <value = float {0.5}> ()
        z = Constant <value = uint8 {0}> ()
        a = Relu (x)
        q = QuantizeLinear (a, s, z)
        d = DequantizeLinear (q, s, z)
        y = Neg (d)
    }""")
    samples = open_random(tmp_path, input_specs(model), (1, 4))
    groups = find_fusion_groups(model, KERNELS)
    for node, other in zip(
        model.graph, [n for n in built.graph if n.op_type in ("Relu", "Neg")], strict=True
    ):
        assert node.outputs[0].name == other.outputs[0].name
    relu, negative = group_errors(model, built, groups, samples, threads=1).values()
    assert relu == pytest.approx(negative)
    assert 5 < relu < 25
