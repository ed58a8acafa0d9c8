"""The ``.epk`` format: unpacking restores every byte, and damaged files are refused."""

import lzma
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.onnx_models import conv_net, f32, parse

from edgepack.errors import ExportError, ModelError
from edgepack.ir.files import save_model
from edgepack.pack import files, spans
from edgepack.pack.container import VERSION
from edgepack.pack.epk import pack, unpack
from edgepack.pack.rans import TOTAL, Coder, decode, encode, normalize
from edgepack.pack.spans import Coding, joined, planes, scaled, words
from edgepack.pack.tables import code_bytes, fit, restore
from edgepack.pack.wire import raw_tensors

RNG = np.random.default_rng(7)


def write(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """A model of one node whose initializers are ``weights``."""
    model = parse("net (float[1] x) => (float[1] y) { y = Relu (x) }", weights=weights)
    ir.save(model, path)
    return path


def codings(path: Path) -> list[Coding]:
    """The codings of a file's spans."""
    from edgepack.pack.choose import choose_codings

    with files.source_files(path) as (sources, found):
        choose_codings(found, lambda s: sources[s.file].content[s.offset : s.offset + s.length])
        return [span.coding for span in found]


def round_trip(path: Path, folder: Path) -> int:
    """Pack and unpack; returns the packed bytes."""
    packed = pack(path, folder / "m.epk", check=False)
    (back,) = unpack(packed.path, folder / ("back" + path.suffix))
    assert back.read_bytes() == path.read_bytes()
    return packed.packed_bytes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20_000), st.integers(1, 5), st.integers(1, 256), st.integers(0, 2**32))
def test_decoding_restores_the_symbols(count: int, tables: int, values: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, tables, count).astype(np.uint16)
    coded = rng.integers(0, values, count).astype(np.uint8)
    counts = np.zeros((tables, 256), np.int64)
    np.add.at(counts, (contexts, coded), 1)
    counts[:, 0] += 1
    coder = Coder.of(normalize(counts))
    assert np.array_equal(decode(encode(coded, contexts, coder), contexts, coder), coded)


def test_the_coder_comes_within_two_thousandths_of_the_entropy() -> None:
    coded = np.clip(RNG.normal(0, 12, 400_000), -127, 127).round().astype(np.int8).view(np.uint8)
    counts = np.bincount(coded, minlength=256)
    share = counts[counts > 0] / counts.sum()
    entropy_bytes = -(share * np.log2(share)).sum() / 8 * len(coded)
    coder = Coder.of(normalize(counts[None].astype(np.int64)))
    code = encode(coded, np.zeros(len(coded), np.uint16), coder)
    assert entropy_bytes < len(code) < 1.002 * entropy_bytes


def test_a_symbol_that_its_table_lacks_is_not_coded_silently() -> None:
    counts = np.zeros((1, 256), np.int64)
    counts[0, :2] = 1
    with pytest.raises(ValueError, match="without a frequency"):
        encode(np.array([2], np.uint8), np.zeros(1, np.uint16), Coder.of(normalize(counts)))


def test_code_of_another_length_is_refused() -> None:
    contexts = np.zeros(5000, np.uint16)
    counts = np.arange(1, 257, dtype=np.int64)[None]
    coder = Coder.of(normalize(counts))
    code = encode(RNG.integers(0, 256, 5000).astype(np.uint8), contexts, coder)
    for broken in (code[:2], code[:-2], code + b"\0\0", code[:-1]):
        with pytest.raises(ModelError, match="block of symbols"):
            decode(broken, contexts, coder)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1000), min_size=256, max_size=256), min_size=1, max_size=4))
def test_tables_are_restored(rows: list[list[int]]) -> None:
    counts = np.array(rows, np.int64)
    tables, stored = fit(counts)
    assert np.array_equal(restore(stored, len(rows)), tables)
    assert (tables.sum(axis=1) == TOTAL).all()
    assert all(np.isfinite(code_bytes(c, t)) for c, t in zip(counts, tables, strict=True))
    with pytest.raises(ModelError, match="tables of frequencies"):
        restore(stored[:-1], len(rows))


def test_a_smooth_distribution_gets_a_curve_and_a_codebook_a_full_table() -> None:
    bell = np.bincount(RNG.normal(0, 20, 3000).round().astype(np.int8).view(np.uint8), minlength=256)
    codebook = np.where(np.isin(np.arange(256), [3, 77, 200]), 1000, 0)
    _, stored = fit(np.array([bell, codebook], np.int64))
    assert list(stored[:2]) == [0, 1]


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([2, 4, 8]), st.sampled_from([0, spans.SIGNED]))
def test_planes_are_joined_again(raw: bytes, size: int, flags: int) -> None:
    numbers = words(np.frombuffer(raw[: len(raw) // size * size], np.uint8), size)
    assert np.array_equal(words(joined(planes(numbers, flags), size, flags), size), numbers)


WEIGHTS = {
    Coding.MATRIX: RNG.normal(0, 25, (64, 40)).clip(-127, 127).round().astype(np.int8),
    Coding.BYTES: RNG.choice(np.array([-90, 0, 3, 55], np.int8), (64, 40)),
    Coding.WORDS: RNG.normal(size=100).astype(np.float32),
    Coding.PLANES: RNG.normal(size=(100, 90)).astype(np.float32),
    Coding.CODEBOOK: RNG.choice(RNG.normal(size=16).astype(np.float32), (50, 50)),
    Coding.SPARSE: np.where(RNG.random((100, 90)) < 0.2, RNG.normal(size=(100, 90)), 0).astype(np.float32),
}


@pytest.mark.parametrize("coding", WEIGHTS, ids=lambda coding: coding.name)
def test_each_kind_of_tensor_gets_its_coding(coding: Coding, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", {"w": WEIGHTS[coding]})
    assert codings(path) == [coding]
    round_trip(path, tmp_path)


def test_sparse_and_clustered_weights_take_few_bits(tmp_path: Path) -> None:
    sparse = round_trip(write(tmp_path / "s.onnx", {"w": WEIGHTS[Coding.SPARSE]}), tmp_path)
    codes = round_trip(write(tmp_path / "c.onnx", {"w": WEIGHTS[Coding.CODEBOOK]}), tmp_path)
    pruned = WEIGHTS[Coding.PLANES][:64, :40].copy().view(np.int8)[:, :40]
    pruned = np.where(RNG.random(pruned.shape) < 0.9, 0, pruned)
    zeros = round_trip(write(tmp_path / "z.onnx", {"w": pruned}), tmp_path)
    overhead = round_trip(write(tmp_path / "e.onnx", {}), tmp_path)
    assert sparse - overhead < 9000 * (
        0.2 * 3.7 + 0.73 / 8 + 0.1
    )  # nonzero numbers, and 0.73 bits of mask each
    assert codes - overhead < 2500 * 0.5 * 1.05 + 16 * 4 + 100  # four bits each
    assert zeros - overhead < 2560 * (0.47 + 0.8) / 8 + 400


def test_clustered_weights_among_others_have_tables_of_their_own(tmp_path: Path) -> None:
    dense = np.clip(np.rint(RNG.normal(size=(400, 400)) * 30), -127, 127).astype(np.int8)
    density = np.geomspace(0.002, 0.7, 300)
    codes = RNG.choice(np.array([-90, -41, 33, 77], np.int8), (300, 300))
    pruned = np.where(RNG.random((300, 300)) < density, codes, 0).astype(np.int8)
    path = write(tmp_path / "m.onnx", {"dense": dense, "pruned": pruned})
    assert Coding.OWN in codings(path)
    together = round_trip(path, tmp_path)
    alone = round_trip(write(tmp_path / "d.onnx", {"dense": dense}), tmp_path)
    one_table = _bits(density.mean()) + 2 * density.mean()  # two bits for which of the four
    assert (together - alone) * 8 / pruned.size < one_table * 0.95


def _bits(share: float) -> float:
    return float(-share * np.log2(share) - (1 - share) * np.log2(1 - share))


def test_scales_of_a_bias_follow_from_those_of_its_weight(tmp_path: Path) -> None:
    scale = RNG.random(200).astype(np.float32)
    weights = {"bias_scale": scale * np.float32(0.0173), "weight_scale": scale}
    path = write(tmp_path / "m.onnx", weights)
    assert sorted(codings(path)) == [Coding.WORDS, Coding.SCALED]
    together = round_trip(path, tmp_path)
    alone = round_trip(write(tmp_path / "n.onnx", {"weight_scale": scale}), tmp_path)
    assert together < alone + 80
    weights["bias_scale"][3] = np.nextafter(weights["bias_scale"][3], np.float32(9))
    assert Coding.SCALED not in codings(write(tmp_path / "m.onnx", weights))


def test_scaling_keeps_infinities_and_nan_to_itself() -> None:
    assert np.isinf(scaled(f32([3e38]), f32([100])))[0]


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    table = RNG.integers(-127, 128, (100, 100)).astype(np.int8)
    once = round_trip(write(tmp_path / "a.onnx", {"a": table}), tmp_path)
    path = write(tmp_path / "b.onnx", {"a": table, "b": table, "c": table})
    assert codings(path) == [Coding.MATRIX, Coding.SAME, Coding.SAME]
    assert round_trip(path, tmp_path) < once + 120


DTYPES = ("int8", "uint8", "int16", "float16", "int32", "float32", "int64", "float64", "bool")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_model_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    weights = {}
    for number in range(data.draw(st.integers(0, 5), label="tensors")):
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        shape = tuple(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        seed, kind = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from(["random", "few", "zero"]))
        rng = np.random.default_rng(seed)
        raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        array = (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)
        if kind == "few" and array.size:
            array = rng.choice(array.reshape(-1)[:5], shape)
        elif kind == "zero" and array.size:
            array = np.where(rng.random(shape) < 0.5, np.zeros((), dtype), array)
        weights[f"w{number}"] = array
    round_trip(write(folder / "m.onnx", weights), folder)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([".ort", ".tflite", ".bin"]))
def test_any_other_file_comes_back(tmp_path_factory: pytest.TempPathFactory, raw: bytes, suffix: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / f"m{suffix}").write_bytes(raw)
    round_trip(folder / f"m{suffix}", folder)


def test_weights_in_a_file_of_another_format_are_coded_by_their_frequencies(tmp_path: Path) -> None:
    weights = RNG.normal(0, 10, 300_000).round().clip(-127, 127).astype(np.int8).tobytes()
    path = tmp_path / "m.tflite"
    path.write_bytes(b"name of a layer " * 1000 + weights)
    assert Coding.BYTES in codings(path)
    assert round_trip(path, tmp_path) < len(lzma.compress(path.read_bytes()))


def test_pieces_and_blocks_of_a_tensor_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepack.pack import choose, epk, layout

    for module in (spans, choose, layout):
        monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(layout, "BLOCK", 3000)
    monkeypatch.setattr(layout, "WORDS_PIECE", 300)
    monkeypatch.setattr(epk, "TEXT_PIECE", 50)
    monkeypatch.setattr(epk, "COPY_BYTES", 4000)
    weights = {coding.name: array for coding, array in WEIGHTS.items()}
    path = write(tmp_path / "m.onnx", {**weights, "more": RNG.random(80), "again": WEIGHTS[Coding.PLANES]})
    assert set(codings(path)) == {*WEIGHTS, Coding.SAME}
    round_trip(path, tmp_path)


def test_external_data_come_back_beside_the_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_model(conv_net(), source / "m.onnx", external=True)
    model = parse(
        "net (float[1, 64] x) => (float[1, 64] y) { y = MatMul (x, w) }",
        weights={"w": RNG.random((64, 64), "f4")},
    )
    save_model(model, source / "m.onnx", external=True)
    packed = pack(source / "m.onnx", tmp_path / "m.epk")
    assert packed.files == ("m.onnx", "m.onnx.data")
    back = unpack(packed.path, tmp_path / "back" / "other.onnx")
    assert [path.name for path in back] == ["other.onnx", "m.onnx.data"]
    assert [p.read_bytes() for p in back] == [(source / n).read_bytes() for n in packed.files]
    onnx.checker.check_model(str(back[0]))
    with pytest.raises(ExportError, match="a file of the model itself"):
        pack(source / "m.onnx", source / "m.onnx.data")


def test_tensors_of_subgraphs_functions_and_attributes_are_found() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (bool c) => (float[20] y) {
            y = If (c) <then_branch = t () => (float[20] a) { a = Constant <value = float[20] w {0}> () },
                        else_branch = e () => (float[20] b) { b = Constant <value = float[20] v {0}> () }>
        }""")
    for node, name in zip(proto.graph.node[0].attribute, "tv", strict=True):
        tensor = node.g.node[0].attribute[0].t
        tensor.CopyFrom(onnx.numpy_helper.from_array(RNG.random(20).astype(np.float32), name))
    found = list(raw_tensors(memoryview(proto.SerializeToString())))
    assert [(t.rows, t.length, t.item_bytes) for t in found] == [(20, 80, 4)] * 2


def test_packing_is_deterministic(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", {coding.name: array for coding, array in WEIGHTS.items()})
    pack(path, tmp_path / "a.epk")
    pack(path, tmp_path / "b.epk")
    assert (tmp_path / "a.epk").read_bytes() == (tmp_path / "b.epk").read_bytes()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    small = {coding.name: array[:30] for coding, array in WEIGHTS.items()}
    return pack(write(folder / "m.onnx", small), folder / "m.epk").path


@settings(max_examples=120, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_refused(packed: Path, where: float, bit: int) -> None:
    raw = bytearray(packed.read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    broken = packed.with_name("broken.epk")
    broken.write_bytes(raw)
    with pytest.raises(
        ModelError, match=r"damaged|cut short|version|no .epk|changed in transfer|copy it again"
    ):
        unpack(broken, packed.with_name("out.onnx"))
    assert sorted(p.name for p in packed.parent.iterdir()) == ["broken.epk", "m.epk", "m.onnx"]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_short_is_refused(packed: Path, where: float) -> None:
    broken = packed.with_name("broken.epk")
    broken.write_bytes(packed.read_bytes()[: int(where * packed.stat().st_size)])
    with pytest.raises(ModelError, match=r"cut short|no .epk file"):
        unpack(broken, packed.with_name("out.onnx"))


def test_a_newer_version_and_other_files_are_refused(packed: Path, tmp_path: Path) -> None:
    raw = packed.read_bytes()
    cases = {
        raw[:8] + bytes([VERSION + 1, 0]) + raw[10:]: "update edgepack",
        raw + b"x": "bytes after its end",
        raw.replace(b"\r\n", b"\n", 1): "line ends",
        b"something else": r"no \.epk file",
    }
    for content, message in cases.items():
        (tmp_path / "m.epk").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            unpack(tmp_path / "m.epk", tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.epk"]


def test_a_name_that_leads_out_of_the_folder_is_refused() -> None:
    for name in ("/etc/passwd", "../m.data", "a/../../b", "c:\\m.data", ""):
        with pytest.raises(ModelError, match="outside of its folder"):
            files.safe_name(name, Path("m.epk"))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "m.onnx"
    for content, message in ((b"", "is empty"), (b"\xff" * 100, "no ONNX model"), (b"\x3a\x7f", "cut short")):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            pack(bad, tmp_path / "m.epk")
    with pytest.raises(ModelError, match="cannot be read"):
        pack(tmp_path / "none.onnx", tmp_path / "m.epk")
    with pytest.raises(ModelError, match="cannot be read"):
        unpack(tmp_path / "none.epk")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_missing_part_of_external_data_is_named(tmp_path: Path) -> None:
    model = parse("net (float[1] x) => (float[1] y) { y = Mul (x, w) }", weights={"w": RNG.random(2000)})
    save_model(model, tmp_path / "m.onnx", external=True, check=False)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ModelError, match="it is cut short"):
        pack(tmp_path / "m.onnx", tmp_path / "m.epk")
    data.unlink()
    with pytest.raises(ModelError, match=r"m.onnx.data: cannot be read"):
        pack(tmp_path / "m.onnx", tmp_path / "m.epk")


@pytest.mark.skipif("EDGEPACK_SUITE" not in os.environ, reason="needs EDGEPACK_SUITE, the folder of tasks")
def test_the_suite_comes_back(tmp_path: Path) -> None:
    for path in sorted(Path(os.environ["EDGEPACK_SUITE"]).glob("*/model.onnx")):
        assert round_trip(path, tmp_path) < 0.95 * path.stat().st_size
