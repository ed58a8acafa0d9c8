"""Gradients against numeric differentiation, for each family of operators."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `tune`")

from support.onnx_models import f32, i64, parse
from support.tune_cases import Case, cases, operators
from torch import Tensor

from edgepack.training.graph import compile_model, run_program
from edgepack.training.operators.table import OPERATORS

NO_GRADIENT = {
    "BitShift": "integers", "BitwiseAnd": "integers", "BitwiseNot": "integers", "BitwiseOr": "integers",
    "BitwiseXor": "integers", "MatMulInteger": "integers",
    "And": "truth", "Or": "truth", "Xor": "truth", "Not": "truth", "Equal": "truth", "Greater": "truth",
    "GreaterOrEqual": "truth", "Less": "truth", "LessOrEqual": "truth", "IsInf": "truth", "IsNaN": "truth",
    "ArgMax": "places", "ArgMin": "places", "NonZero": "places", "Hardmax": "steps", "Ceil": "steps",
    "Floor": "steps", "Round": "steps", "Sign": "steps", "Mod": "steps",
    "Shape": "sizes", "Size": "sizes", "Range": "sizes", "ConstantOfShape": "sizes", "EyeLike": "sizes",
    "OneHot": "its values are read as they are",
    "QuantizeLinear": "tested below", "DequantizeLinear": "tested below",
    "DynamicQuantizeLinear": "tested below",
    "CastLike": "a change of type", "Cast": "a change of type",
    "GlobalLpPool": "has no node test", "Det": "tested below", "Trilu": "tested below",
}  # fmt: skip
READ_AT_ONCE = {
    "BatchNormalization": {3, 4},
    "Clip": {1, 2},
    "Resize": {1, 2},
    "Upsample": {1},
    "Pad": {2},
    "TopK": {1},
    "Where": {0},
}
"""Inputs of floats that are settings, or frozen."""


def _case_of(op: str) -> Case | None:
    """The smallest case of one node with floats in and out."""
    found = [
        case
        for case in cases().values()
        if operators(case) == {op}
        and len(list(case.model.graph)) == 1
        and any(_real(a) for a in case.outputs.values())
        and any(_real(a) for a in case.feeds.values())
    ]
    return min(found, key=lambda c: sum(a.size for a in c.feeds.values()), default=None)


def _real(array: np.ndarray) -> bool:
    return array.dtype in (np.float32, np.float64) and array.size > 0


@pytest.mark.parametrize("op", sorted(set(OPERATORS) - set(NO_GRADIENT)))
def test_gradient_of(op: str) -> None:
    case = _case_of(op)
    assert case is not None, f"no case of {op} has floats in and out"
    program = compile_model(case.model)
    rng = np.random.default_rng(0)
    settings = READ_AT_ONCE.get(op, set())
    places = [str(v.name) for v in case.model.graph.inputs]
    fixed = {n: torch.from_numpy(np.array(a)) for n, a in case.feeds.items()}
    fixed = {n: t.double() if t.is_floating_point() else t for n, t in fixed.items()}
    variable = [
        n for i, n in enumerate(places) if n in fixed and fixed[n].is_floating_point() and i not in settings
    ]
    # Ties and kinks have no derivative: a little noise moves all values off them.
    tensors = [
        (fixed[n] + 0.01 * torch.from_numpy(np.asarray(rng.uniform(0.1, 1, fixed[n].shape)))).requires_grad_()
        for n in variable
    ]
    if op in ("Acosh",):
        tensors = [(t.detach() + 1).requires_grad_() for t in tensors]
    if op in ("Acos", "Asin", "Atanh"):
        tensors = [(t.detach() * 0.5).requires_grad_() for t in tensors]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        made = run_program(program, {**fixed, **dict(zip(variable, given, strict=True))})
        return tuple(t for t in made.values() if t.dtype == torch.float64 and t.requires_grad)

    assert torch.autograd.gradcheck(outputs, tensors, eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_gradient_through_a_branch_and_a_determinant() -> None:
    body = """net (bool c, double[2, 2] x) => (double y) {
        z = If (c) <
            then_branch = yes () => (double[2, 2] a) { a = MatMul (x, x) },
            else_branch = no () => (double[2, 2] b) { b = Exp (x) }
        >
        u = Trilu (z, k)
        v = Add (u, x)
        y = Det (v)
    }"""
    program = compile_model(parse(body, weights={"k": i64(0)}))
    x = torch.tensor([[1.0, 2.0], [-0.5, 0.3]], dtype=torch.float64, requires_grad=True)
    for condition in (True, False):
        feeds = {"c": torch.tensor(condition)}
        assert torch.autograd.gradcheck(lambda v, f=feeds: run_program(program, {**f, "x": v})["y"], [x])


def test_gradient_passes_rounding_and_stops_at_saturation() -> None:
    body = """net (float[4] x) => (float[4] y) {
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s, z)
    }"""
    model = parse(body, weights={"s": f32(0.5), "z": np.asarray(10, np.int8)})
    x = torch.tensor([0.1, 1.3, 100.0, -100.0], requires_grad=True)
    y = run_program(compile_model(model), {"x": x})["y"]
    assert y.tolist() == [0.0, 1.5, 58.5, -69.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_gradient_of_a_dynamic_range() -> None:
    body = """net (float[4] x) => (float[4] y) {
        q, s, z = DynamicQuantizeLinear (x)
        y = DequantizeLinear (q, s, z)
    }"""
    x = torch.tensor([0.1, 1.3, 2.0, -1.0], requires_grad=True)
    run_program(compile_model(parse(body)), {"x": x})["y"].sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 1.0]
