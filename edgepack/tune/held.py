"""The tensors that training changes: free, with zeros that stay, or shared values whose places stay."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgepack.errors import ConfigError, did_you_mean
from edgepack.model import Array
from edgepack.tune.graph import as_tensor
from edgepack.tune.weights import Kind, Trainable, array_of, keys_of, trainables

FEWEST_SHARED = 512
"""Values of a weight below which equal ones are chance."""
PLACES_OF_ONE = 8
"""Places that each value of a weight has on average, at least, where its values count as shared."""


@dataclass(slots=True, eq=False)
class Held:
    """Trained tensors by key. ``values()`` is what the graph computes with.

    A tensor is trained in units of its own size, one for each output of a weight: where batch normalization
    was folded in, channels differ by orders of magnitude, and steps of one size would ruin the small and not
    move the large. Units are powers of two, so that what is not trained stays what it was to the last bit.

    Zeros of a weight stay zeros (a mask), and a weight of few different values keeps which value stands
    where: its centroids are trained, each by the sum of the gradients of its places (Han et al., 2016).
    """

    trained: dict[str, Trainable]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    """One where a weight is, zero where it is not."""
    places: dict[str, Tensor] = field(default_factory=dict)
    """Of shared values: the index of the centroid at each place."""
    returning: bool = False
    """Whether weights that a mask removes go on learning, so that they may come back."""

    def values(self) -> dict[str, Tensor]:
        """The weights as the graph reads them; gradients reach the trained tensors."""
        return {key: self.value(key) for key in self.tensors}

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
        return whole.index_select(0, self.places[key]).reshape(self.trained[key].shape)

    def arrays(self) -> dict[str, Array]:
        """Copies of the weights, contiguous, for writing back."""
        with torch.no_grad():
            return {key: self._array(key) for key in self.tensors}

    def _array(self, key: str) -> Array:
        final = self.dense(key) * self.masks[key] if key in self.masks else self.dense(key)
        return np.array(final.numpy(), order="C").reshape(self.trained[key].shape)

    def rows(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``[outputs, inputs]``."""
        return tensor.movedim(self.trained[key].output_axis, 0).flatten(1)

    def from_rows(self, key: str, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        axis, shape = self.trained[key].output_axis, list(self.trained[key].shape)
        moved = [shape.pop(axis), *shape]
        return rows.reshape(moved).movedim(0, axis)

    def weights(self) -> list[str]:
        """Keys of what is pruned and regularised."""
        return [key for key, trained in self.trained.items() if trained.kind is Kind.WEIGHT]


def hold(model: ir.Model, keep: Sequence[str] = ()) -> Held:
    """The trainable constants of ``model`` as tensors, but those that ``keep`` names.

    Raises:
        ConfigError: a name to keep that no weight has, or nothing is left to train.
    """
    found = trainables(model)
    for pattern in keep:
        if not fnmatch.filter(found, pattern):
            raise ConfigError(f"tune: keep: no weight is named {pattern!r}, {did_you_mean(pattern, found)}")
    chosen = {key: t for key, t in found.items() if not any(fnmatch.fnmatch(key, p) for p in keep)}
    if not chosen:
        raise ConfigError("tune: the model has no weights to train, or all are kept")
    contents = {key: array_of(value) for value, key in keys_of(model).items() if key in chosen}
    held = Held(chosen)
    for key in chosen:
        _add(held, key, contents[key])
    return held


def _add(held: Held, key: str, array: Array) -> None:
    weight = held.trained[key].kind is Kind.WEIGHT
    if weight and array.size >= FEWEST_SHARED:
        centroids, places = np.unique(array, return_inverse=True)
        if len(centroids) <= array.size // PLACES_OF_ONE:
            kept = as_tensor(np.asarray(centroids != 0, np.float32))
            held.places[key] = as_tensor(places.reshape(-1))
            _put(held, key, as_tensor(centroids), _power_of_two(as_tensor(array).square().mean()))
            held.tensors[key].register_hook(lambda gradient: gradient * kept)  # zeros stay zeros
            return
    tensor = as_tensor(array)
    if tensor.dim() == 4:
        # Convolutions of torch take a third less time in this layout.
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if weight and not array.all():
        held.masks[key] = (tensor != 0).to(tensor.dtype)
    size = tensor.square().mean()
    if weight and tensor.dim() > 1:
        axes = [a for a in range(tensor.dim()) if a != held.trained[key].output_axis]
        size = tensor.square().mean(axes, keepdim=True)
    _put(held, key, tensor, _power_of_two(size))


def _power_of_two(mean_square: Tensor) -> Tensor:
    """The power of two nearest to the root, one where all is zero."""
    nearest: Tensor = (mean_square.clamp(min=1e-24).log2() / 2).round().exp2()
    return torch.where(mean_square > 0, nearest, torch.ones_like(nearest))


def _put(held: Held, key: str, tensor: Tensor, unit: Tensor) -> None:
    held.units[key] = unit
    held.tensors[key] = (tensor / unit).requires_grad_()
