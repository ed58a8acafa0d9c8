"""A pool: shared tensors are stored once, and the outputs of the models stay the same."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from support.onnx_models import difference, i64, parse, run

from edgepack.errors import ConfigError, ExportError
from edgepack.ir.files import load_model, save_model
from edgepack.pack.pool import PAGE_BYTES, WEIGHTS, make_pool, pool_names
from edgepack.pipeline.packing import facts, pack_models, passes, text
from edgepack.pipeline.pool_gate import Request

RNG = np.random.default_rng(3)
BASE = {
    "a": RNG.normal(size=(64, 512)).astype(np.float32),
    "b": RNG.normal(size=(512, 48)).astype(np.float32),
    "head": RNG.normal(size=(48, 10)).astype(np.float32),
    "shape": i64([-1, 10]),
}
FEED = {"x": RNG.normal(size=(2, 64)).astype(np.float32)}


def write(path: Path, **changes: npt.NDArray[np.float32]) -> Path:
    """A model of three layers, in a folder of its own."""
    body = """net (float[n, 64] x) => (float[n, 10] y) {
        h = MatMul (x, a) r = Relu (h) g = MatMul (r, b) z = MatMul (g, head) y = Reshape (z, shape)
    }"""
    path.parent.mkdir(exist_ok=True)
    save_model(parse(body, weights={**BASE, **changes}), path)
    return path


def shaken(weight: npt.NDArray[np.float32], relative: float) -> npt.NDArray[np.float32]:
    """The weight with noise of this relative norm."""
    noise = RNG.normal(size=weight.shape)
    near = weight + noise * relative * np.linalg.norm(weight) / np.linalg.norm(noise)
    return np.asarray(near, np.float32)


def test_models_that_differ_in_the_head_share_the_rest(tmp_path: Path) -> None:
    one = write(tmp_path / "one.onnx")
    two = write(tmp_path / "two.onnx", head=shaken(BASE["head"], 0.5))
    before = [path.read_bytes() for path in (one, two)]
    pool = make_pool([one, two], tmp_path / "pool")
    assert pool.pool_bytes < 1.15 * one.stat().st_size
    assert [len(model.shared) for model in pool.models] == [0, 2]
    assert [path.read_bytes() for path in (one, two)] == before
    for path in (one, two):
        assert difference(run(path, FEED), run(tmp_path / "pool" / path.name, FEED)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.onnx", "pool", "two.onnx"]


def test_weights_are_aligned_for_memory_mapping(tmp_path: Path) -> None:
    make_pool([write(tmp_path / "one.onnx")], tmp_path / "pool")
    model = load_model(tmp_path / "pool" / "one.onnx")
    found = {n: v.const_value for n, v in model.graph.initializers.items()}
    for name, step in (("a", PAGE_BYTES), ("b", PAGE_BYTES), ("head", 64)):
        tensor = found[name]
        assert isinstance(tensor, ir.ExternalTensor) and (tensor.offset or 0) % step == 0
    assert not isinstance(found["shape"], ir.ExternalTensor)


def test_similar_tensors_are_shared_within_the_error_that_is_asked_for(tmp_path: Path) -> None:
    one = write(tmp_path / "one.onnx")
    two = write(tmp_path / "two.onnx", a=shaken(BASE["a"], 0.004), b=shaken(BASE["b"], 0.02))
    assert len(make_pool([one, two], tmp_path / "equal").models[1].shared) == 1
    (_, model) = make_pool([one, two], tmp_path / "near", within=0.01).models
    errors = {shared.tensor: shared.relative_error for shared in model.shared}
    assert set(errors) == {"a", "head"} and errors["head"] == 0
    assert errors["a"] == pytest.approx(0.004, rel=0.01)
    assert model.relative_error < 0.004
    assert difference(run(two, FEED), run(tmp_path / "near" / "two.onnx", FEED)) < 0.02


def test_a_model_that_fails_its_gate_keeps_its_own_tensors(tmp_path: Path) -> None:
    one = write(tmp_path / "one.onnx")
    two = write(tmp_path / "two.onnx", a=shaken(BASE["a"], 0.05))
    kept = pack_models([one, two], tmp_path / "kept", 0.1)
    assert "keeps its own" in text(kept) and "dB" in text(kept) and passes(kept)
    assert difference(run(two, FEED), run(tmp_path / "kept" / "two.onnx", FEED)) == 0
    shared = pack_models([one, two], tmp_path / "shared", 0.1, Request(min_sqnr_db=15.0))
    model = facts(shared)["models"][1]
    assert 15 < model["verdict"]["moved_db"] < 30 and not model["note"]
    assert facts(shared)["pool_bytes"] < facts(kept)["pool_bytes"]


def test_models_of_one_name_are_prefixed_with_their_folders(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "model.onnx") for name in ("arm", "x86")]
    assert pool_names(paths) == ["arm-model.onnx", "x86-model.onnx"]
    pool = make_pool(paths, tmp_path / "pool")
    assert {p.name for p in pool.folder.iterdir()} == {"arm-model.onnx", "x86-model.onnx", WEIGHTS}
    with pytest.raises(ConfigError, match="two models of one name"):
        make_pool([paths[0], paths[0]], tmp_path / "twice")


def test_what_cannot_be_pooled_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    one = write(tmp_path / "one.onnx")
    with pytest.raises(ExportError, match="not an empty folder"):
        make_pool([one], tmp_path)
    with pytest.raises(ConfigError, match=r"--within 1\.5"):
        make_pool([one], tmp_path / "pool", within=1.5)
    with pytest.raises(ConfigError, match="holds one model"):
        pack_models([one, one], tmp_path / "m.epk")
    with pytest.raises(ConfigError, match="for pools"):
        pack_models([one], tmp_path / "m.epk", 0.1)
    with pytest.raises(ConfigError, match="for pools"):
        pack_models([one], tmp_path / "m.epk", request=Request(target="x86-cpu"))
    with pytest.raises(ConfigError, match=r"m\.ort: a pool holds"):
        pack_models([one, tmp_path / "m.ort"], tmp_path / "pool")
    with pytest.raises(ConfigError, match="or a folder for a pool"):
        pack_models([one], tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["one.onnx"]


def test_one_model_is_packed_into_one_file(tmp_path: Path) -> None:
    packed = pack_models([write(tmp_path / "one.onnx")], tmp_path / "one.epk")
    assert facts(packed)["packed_bytes"] == (tmp_path / "one.epk").stat().st_size
    assert "unpacked again and compared" in text(packed)
