"""The trained parameters: dense, masked (zeros stay zeros) or clustered (centroids with fixed indices)."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.errors import ConfigError, did_you_mean
from edgepack.ir.arrays import Array
from edgepack.ir.numerics import short_scale
from edgepack.quantization.weights.codebook_scales import KEY
from edgepack.training.graph import as_tensor
from edgepack.training.operators.quantize import round_through
from edgepack.training.step import spread
from edgepack.training.weights import Kind, Trainable, array_of, keys_of, trainables

FEWEST_SHARED = 512
"""Smallest weight, in values, that can count as clustered."""
PLACES_OF_ONE = 8
"""A weight counts as clustered if each distinct value occurs at least this often on average."""

MOST_CODE = 127


@dataclass(slots=True, eq=False)
class Parameters:
    """Trained tensors by key; :meth:`values` gives the weights that the graph computes with.

    Each tensor is stored divided by ``units``, its magnitude for each output channel: after batch
    normalization was folded, channels differ by orders of magnitude, and one step size would not suit all.
    Units are powers of two, so that untrained values keep every bit.

    Zeros of a weight stay zeros (a mask). A clustered weight keeps its indices, and its centroids are trained
    by the sum of the gradients of their places (Han et al., 2016). Where the values are integers times a
    scale for each output (``codebook_scales``), the integers and the scales are trained separately.
    """

    trained: dict[str, Trainable]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    """1 for weights that remain, 0 for pruned ones."""
    places: dict[str, Tensor] = field(default_factory=dict)
    """For clustered weights: the index of the centroid at each place."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Codebook scales at the start, one for each output. The trained tensor is the logarithm of the ratio to
    them, under :func:`scale_key`."""
    apart: list[str] = field(default_factory=list)
    """Keys of tensors that are trained besides the constants of the model, such as activation scales."""
    returning: bool = False
    """Whether masked weights still get gradients, so that they can be chosen again (straight-through)."""

    def values(self) -> dict[str, Tensor]:
        """The weights of the graph, as functions of the trained tensors."""
        return {key: self.value(key) for key in self.trained}

    def value(self, key: str) -> Tensor:
        """One weight."""
        dense, mask = self.dense(key), self.masks.get(key)
        if mask is None:
            return dense
        masked = dense * mask
        return dense + (masked - dense).detach() if self.returning else masked

    def dense(self, key: str) -> Tensor:
        """One weight without its mask."""
        whole = self.tensors[key] * self.units[key]
        if key not in self.places:
            return whole
        scale = self.scale(key)
        if scale is None:
            return self._placed(key, whole)
        return self._placed(key, _codes(whole)) * self._along(key, scale)

    def add_apart(self, key: str, tensor: Tensor) -> None:
        """Train ``tensor`` as well."""
        self.apart.append(key)
        self.tensors[key] = tensor.requires_grad_()

    def fade(self, share: float) -> None:
        """Weight decay of masked weights: multiply them by ``1 - share`` (Zhou et al., 2021)."""
        with torch.no_grad():
            for key, mask in self.masks.items():
                self.tensors[key].mul_(1 - share * (1 - mask))

    def scale(self, key: str) -> Tensor | None:
        """The codebook scales of a weight, one for each output; ``None`` without."""
        start = self.scales.get(key)
        return None if start is None else start * self.tensors[scale_key(key)].exp()

    def arrays(self) -> dict[str, Array]:
        """Copies of the weights for writing back, of codebook scales under :func:`scale_key`, and of the
        tensors in :attr:`apart`."""
        found = {key: self.tensors[key].detach().numpy().copy() for key in self.apart}
        with torch.no_grad():
            for key in self.trained:
                final = self.dense(key) * self.masks[key] if key in self.masks else self.dense(key)
                if (trained := self.scale(key)) is not None:
                    found[scale_key(key)] = scale = short_scale(trained.numpy())
                    codes = self._placed(key, _codes(self.tensors[key] * self.units[key]))
                    final = codes * self._along(key, as_tensor(scale))
                found[key] = np.array(final.numpy(), order="C").reshape(self.trained[key].shape)
        return found

    def _placed(self, key: str, values: Tensor) -> Tensor:
        return values.index_select(0, self.places[key]).reshape(self.trained[key].shape)

    def _along(self, key: str, scale: Tensor) -> Tensor:
        return spread(scale, self.trained[key].output_axis, len(self.trained[key].shape))

    def rows(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``[outputs, inputs]``."""
        return tensor.movedim(self.trained[key].output_axis, 0).flatten(1)

    def from_rows(self, key: str, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        axis, shape = self.trained[key].output_axis, list(self.trained[key].shape)
        moved = [shape.pop(axis), *shape]
        return rows.reshape(moved).movedim(0, axis)

    def weights(self) -> list[str]:
        """Keys of the tensors that are pruned and regularized."""
        return [key for key, trained in self.trained.items() if trained.kind is Kind.WEIGHT]


def trainable_parameters(model: ir.Model, keep: Sequence[str] = ()) -> Parameters:
    """The trainable constants of ``model`` as tensors, without those that match ``keep``.

    Raises:
        ConfigError: a pattern in ``keep`` matches no weight, or nothing is left to train.
    """
    found = trainables(model)
    for pattern in keep:
        if not fnmatch.filter(found, pattern):
            raise ConfigError(f"tune: keep: no weight is named {pattern!r}, {did_you_mean(pattern, found)}")
    chosen = {key: t for key, t in found.items() if not any(fnmatch.fnmatch(key, p) for p in keep)}
    if not chosen:
        raise ConfigError("tune: the model has no weights to train, or all are kept")
    parameters = Parameters(chosen)
    values = {key: value for value, key in keys_of(model).items()}
    for key in chosen:
        array, start = array_of(values[key]), values[key].meta.get(KEY)
        if start is None or not _add_with_codebook_scales(parameters, key, array, start):
            _add(parameters, key, array)
    return parameters


def scale_key(key: str) -> str:
    """The key of the codebook scales of the weight ``key``."""
    return f"{key} scale"


def _codes(values: Tensor) -> Tensor:
    """Round to int8 codes, straight-through."""
    return round_through(values).clamp(-MOST_CODE, MOST_CODE)


def _add_with_codebook_scales(parameters: Parameters, key: str, array: Array, start: Array) -> bool:
    """Add a weight as codes and scales; return whether it still is codes times ``start``, since another pass
    may have changed it."""
    shape, axis = parameters.trained[key].shape, parameters.trained[key].output_axis
    if not shape or start.shape != (shape[axis],):
        return False
    along = np.moveaxis(np.broadcast_to(start, (*np.delete(shape, axis), shape[axis])), -1, axis)
    codes, places = np.unique(np.rint(array / along), return_inverse=True)
    if np.abs(codes).max(initial=0) > MOST_CODE or not np.array_equal(
        codes[places].reshape(shape) * along, array
    ):
        return False
    kept = as_tensor(np.asarray(codes != 0, np.float32))
    parameters.places[key] = as_tensor(places.reshape(-1))
    parameters.scales[key] = as_tensor(start)
    _put(parameters, key, as_tensor(codes), _power_of_two(as_tensor(codes[codes != 0]).square().mean()))
    parameters.tensors[key].register_hook(lambda gradient: gradient * kept)  # zeros stay zeros
    _put(parameters, scale_key(key), torch.zeros(len(start)), torch.ones(()))
    return True


def _add(parameters: Parameters, key: str, array: Array) -> None:
    weight = parameters.trained[key].kind is Kind.WEIGHT
    if weight and array.size >= FEWEST_SHARED:
        centroids, places = np.unique(array, return_inverse=True)
        if len(centroids) <= array.size // PLACES_OF_ONE:
            kept = as_tensor(np.asarray(centroids != 0, np.float32))
            parameters.places[key] = as_tensor(places.reshape(-1))
            _put(parameters, key, as_tensor(centroids), _power_of_two(as_tensor(array).square().mean()))
            parameters.tensors[key].register_hook(lambda gradient: gradient * kept)  # zeros stay zeros
            return
    tensor = as_tensor(array)
    if tensor.dim() == 4:
        # torch convolutions take a third less time in channels-last layout.
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if weight and not array.all():
        parameters.masks[key] = (tensor != 0).to(tensor.dtype)
    size = tensor.square().mean()
    if weight and tensor.dim() > 1:
        axes = [a for a in range(tensor.dim()) if a != parameters.trained[key].output_axis]
        size = tensor.square().mean(axes, keepdim=True)
    _put(parameters, key, tensor, _power_of_two(size))


def _power_of_two(mean_square: Tensor) -> Tensor:
    """The power of two nearest to the square root; 1 for zero."""
    nearest: Tensor = (mean_square.clamp(min=1e-24).log2() / 2).round().exp2()
    return torch.where(mean_square > 0, nearest, torch.ones_like(nearest))


def _put(parameters: Parameters, key: str, tensor: Tensor, unit: Tensor) -> None:
    parameters.units[key] = unit
    parameters.tensors[key] = (tensor / unit).requires_grad_()
