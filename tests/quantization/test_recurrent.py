"""LSTM and GRU: ranges found at run time, stored weights."""

from pathlib import Path

import numpy as np
import pytest
from support.quantize_cases import GRANULARITIES, STORABLE, recurrent
from support.quantizing import CHANNEL, DYNAMIC, FLOAT, WEIGHT_ONLY, build, target, weight

from edgepack.ir.scheme import Granularity
from edgepack.quantization.plan.types import Method


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("outputs", ["y, h", ", h"])
def test_lstm_with_ranges_found_at_run_time(
    outputs: str, directions: int, granularity: Granularity, tmp_path: Path
) -> None:
    case = recurrent("LSTM", directions, outputs)
    made = build(tmp_path, case.body, case.weights, device=target(granularity=granularity))
    assert set(made.forms().values()) == {"dynamic"}
    assert made.fused.integer_kernels == {"DynamicQuantizeLSTM": 1}
    assert made.sqnr_db >= (41 if granularity is CHANNEL else 38)


@pytest.mark.parametrize("method", [DYNAMIC, WEIGHT_ONLY])
@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_states_lengths_and_peepholes(op: str, direction: str, method: Method, tmp_path: Path) -> None:
    directions = 2 if direction == "bidirectional" else 1
    weights = recurrent(op, directions).weights
    more = ", s, q" if op == "LSTM" else ""
    if op == "LSTM":
        weights |= {"s": weight(directions, 2, 10, seed=6), "q": weight(directions, 30, seed=7)}
    node = f'y, h = {op}<hidden_size=10,direction="{direction}",clip=2.5>(x, w, r, b, n, i{more})'
    given = f"float[6,2,8] x, int32[2] n, float[{directions},2,10] i"
    body = f"net ({given}) => (float[a,b,c,d] y, float[e,f,g] h) {{ {node} }}"
    made = build(tmp_path, body, weights, method=method, feeds={"n": np.asarray([6, 3], np.int32)})
    assert made.forms() == {"y": "dynamic" if (op, method) == ("LSTM", DYNAMIC) else "weight_only"}
    assert made.sqnr_db >= 40


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("op, directions", [("LSTM", 1), ("LSTM", 2), ("GRU", 1), ("GRU", 2)])
def test_recurrent_weights_are_stored(
    op: str, directions: int, granularity: Granularity, tmp_path: Path
) -> None:
    case = recurrent(op, directions)
    device = target(granularity=granularity, weight_only=STORABLE)
    made = build(tmp_path, case.body, case.weights, method=WEIGHT_ONLY, device=device)
    assert set(made.forms().values()) == {"weight_only"}
    assert made.fused.float_operators == {op: 1}
    assert made.sqnr_db >= 39


def test_gru_has_no_integer_kernel(tmp_path: Path) -> None:
    case = recurrent("GRU", 1)
    stored = build(tmp_path, case.body, case.weights, method=DYNAMIC, device=target(weight_only=STORABLE))
    (group,) = stored.plan.groups
    assert (group.method, group.reason.text) == (
        WEIGHT_ONLY,
        "no dynamic kernel for GRU; weights stored as int8",
    )
    not_stored = target(weight_only=("MatMul",))
    plain = build(tmp_path, case.body, case.weights, method=DYNAMIC, device=not_stored)
    (group,) = plain.plan.groups
    assert (group.method, group.reason.text) == (FLOAT, "the target's runtime has no integer kernel for GRU")
