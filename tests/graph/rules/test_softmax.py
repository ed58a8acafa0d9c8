import pytest
from support.normalizing import check
from support.onnx_models import ops, parse, randoms


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("batch", ["2", "n"])
def test_channels(op: str, batch: str) -> None:
    body = f"""net (float[{batch}, 5, 3, 4] x) => (float[{batch}, 5, 3, 4] y) {{ y = {op} <axis = 1> (x) }}"""
    normal, _ = check(parse(body), randoms(x=(2, 5, 3, 4)))
    assert ops(normal) == {"Transpose": 2, "Flatten": 1, "Reshape": 1, op: 1}


def test_behind_a_transpose() -> None:
    body = """net (float[2, 5, 3, 4] x) => (float[2, 5, 3, 4] y) {
        t = Transpose <perm = [0, 3, 2, 1]> (x)
        s = Softmax <axis = -1> (t)
        y = Transpose <perm = [0, 3, 2, 1]> (s)
    }"""
    normal, notes = check(parse(body), randoms(x=(2, 5, 3, 4)))
    assert ops(normal) == {"Transpose": 2, "Flatten": 1, "Reshape": 1, "Softmax": 1}
    assert notes.applied["softmax_between_transposes"] == 1
    moved = [n.attributes["perm"].as_ints() for n in normal.graph if n.op_type == "Transpose"]
    assert [list(perm) for perm in moved] == [[0, 2, 3, 1], [0, 3, 1, 2]]  # one axis moves: the fast kernel


def test_transposes_that_restore_the_last_axis() -> None:
    body = """net (float[3, 5, 4] x) => (float[3, 5, 4] y) {
        t = Transpose <perm = [1, 2, 0]> (x)
        s = Softmax <axis = 1> (t)
        y = Transpose <perm = [2, 0, 1]> (s)
    }"""
    normal, _ = check(parse(body), randoms(x=(3, 5, 4)))
    assert ops(normal) == {"Softmax": 1}


@pytest.mark.parametrize("more", ["z = Neg (s)", "z = Neg (t)", "z = Identity (s)"])
def test_transposed_data_with_other_consumers(more: str) -> None:
    body = f"""net (float[2, 3, 5] x) => (float[2, 3, 5] y, float[a, b, c] z) {{
        t = Transpose <perm = [1, 2, 0]> (x)
        s = Softmax <axis = 2> (t)
        y = Transpose <perm = [2, 0, 1]> (s)
        {more}
    }}"""
    check(parse(body), randoms(x=(2, 3, 5)))


def test_last_axis_stays() -> None:
    body = """net (float[2, 3, 5] x) => (float[2, 3, 5] y) {
        t = Transpose <perm = [1, 0, 2]> (x)
        s = Softmax <axis = -1> (t)
        y = Transpose <perm = [1, 0, 2]> (s)
    }"""
    normal, _ = check(parse(body), randoms(x=(2, 3, 5)))
    assert ops(normal) == {"Softmax": 1}


@pytest.mark.parametrize("channels", ["5", "c"])
def test_dynamic_sizes(channels: str) -> None:
    shape = f"float[n, {channels}, h, w]"
    body = f"net ({shape} x) => ({shape} y) {{ y = Softmax <axis = 1> (x) }}"
    normal, _ = check(parse(body), randoms(x=(2, 5, 3, 4)))
    assert ops(normal) == {"Transpose": 2, "Shape": 1, "Flatten": 1, "Reshape": 1, "Softmax": 1}
