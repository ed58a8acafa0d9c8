"""Weight clustering: each layer gets few distinct values, which int8 stores exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepack.compression.codebook import cluster as cluster_matrix
from edgepack.compression.weights import matrix_of, weighted_groups, write_weight
from edgepack.config.passes import Cluster
from edgepack.data.samples import Samples
from edgepack.ir.model import clone
from edgepack.quantization.groups import FusionGroup
from edgepack.quantization.weights.codebook_scales import set_codebook_scales
from edgepack.quantization.weights.moments import stream_moments


@dataclass(frozen=True, slots=True)
class ClusteredWeight:
    """One weight: its fusion group, its size and its number of distinct integers."""

    group: str
    values: int
    codes: int


def cluster(
    model: ir.Model,
    groups: Sequence[FusionGroup],
    samples: Samples,
    config: Cluster,
    *,
    threads: int,
    seed: int,
    on_sample: Callable[[], None] = lambda: None,
) -> tuple[ir.Model, tuple[ClusteredWeight, ...]]:
    """A model whose weights are at most ``2 ** config.bits`` distinct integers times a scale for each output.

    Biases compensate the mean error. The scales are stored as codebook scales, which int8 weights reuse.

    Raises:
        ConfigError: a pattern in ``keep`` matches no node, or nothing is left to cluster.
        CalibrationError: the model fails on a sample.
    """
    nodes = {n.name: n for n in model.graph}
    wanted = weighted_groups("cluster", groups, nodes, config.keep, config.keep_types)
    clustered, rows = clone(model), []
    targets = {n.name: n for n in clustered.graph}
    measured = stream_moments(
        model, wanted, samples, with_second_moments=True, threads=threads, seed=seed, on_sample=on_sample
    )
    for group, moments in measured:
        weight = matrix_of(nodes[group.name])
        seen = moments.second if moments.count else None
        coded = cluster_matrix(weight, seen, 2**config.bits, config.outputs)
        after = coded.codes * coded.scale
        value = write_weight(clustered.graph, targets[group.name], weight, after, moments, "clustered")
        set_codebook_scales(value, coded.scale.reshape(-1).astype(np.float32))
        rows.append(ClusteredWeight(group.name, weight.size, len(np.unique(coded.codes))))
    return clustered, tuple(rows)
