"""Fingerprint of a model: a digest of what it computes."""

import hashlib

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

_CHUNK_BYTES = 16 << 20


def fingerprint(model: ir.Model) -> str:
    """SHA-256 of what the model computes: operators, attributes, edges, value names and weights.

    Node names, doc strings and metadata are excluded; value names are included, since ranges are stored under
    them. Reads one weight at a time.
    """
    digest = hashlib.sha256()
    _put(digest, *(f"{domain}:{version}" for domain, version in sorted(model.graph.opset_imports.items())))
    _hash_graph(digest, model.graph)
    for identifier in sorted(model.functions):
        function = model.functions[identifier]
        _put(digest, "function", *map(str, identifier), *sorted(function.attributes))
        _put(digest, *(v.name for v in function.inputs), ">", *(v.name for v in function.outputs))
        for node in function:
            _hash_node(digest, node)
    return digest.hexdigest()


def _put(digest: "hashlib._Hash", *words: str | None) -> None:
    """Hash words with their lengths, so that no two lists of words give the same bytes."""
    for word in words:
        raw = b"-" if word is None else word.encode()
        digest.update(b"%d:" % len(raw) + raw)


def _hash_graph(digest: "hashlib._Hash", graph: ir.Graph) -> None:
    _put(digest, "graph")
    for value in (*graph.inputs, *graph.outputs):
        _put(digest, value.name, str(value.type), str(value.shape))
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        _put(digest, "weight", name)
        if tensor is not None:
            _hash_tensor(digest, tensor)
    for node in graph:
        _hash_node(digest, node)


def _hash_node(digest: "hashlib._Hash", node: ir.Node) -> None:
    _put(digest, "node", node.domain, node.op_type, node.overload)
    _put(digest, *(None if v is None else v.name for v in node.inputs), ">", *(v.name for v in node.outputs))
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        _put(digest, name, str(attribute.type))
        if attribute.is_ref():
            _put(digest, "ref", attribute.ref_attr_name)
        elif attribute.type == ir.AttributeType.GRAPH:
            _hash_graph(digest, attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                _hash_graph(digest, graph)
        elif attribute.type == ir.AttributeType.TENSOR:
            _hash_tensor(digest, attribute.as_tensor())
        else:
            _put(digest, repr(attribute.value))


def _hash_tensor(digest: "hashlib._Hash", tensor: ir.TensorProtocol) -> None:
    _put(digest, str(tensor.dtype), str(tuple(tensor.shape)))
    digest.update(tensor_digest(tensor))


def tensor_digest(tensor: ir.TensorProtocol) -> bytes:
    """SHA-256 of a tensor's content, read in chunks if it is mapped from a file."""
    digest = hashlib.sha256()
    if tensor.dtype == ir.DataType.STRING:
        for text in np.asarray(tensor.numpy()).ravel():
            _put(digest, text.decode() if isinstance(text, bytes) else str(text))
        return digest.digest()
    raw = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    for start in range(0, raw.size, _CHUNK_BYTES):
        digest.update(raw[start : start + _CHUNK_BYTES].data)
    return digest.digest()
