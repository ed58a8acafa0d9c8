"""The tensors that training changes: free, with zeros that stay, or shared values whose places stay."""

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
"""Values of a weight below which equal ones are chance."""
PLACES_OF_ONE = 8
"""Places that each value of a weight has on average, at least, where its values count as shared."""

MOST_CODE = 127


@dataclass(slots=True, eq=False)
class Parameters:
    """Trained tensors by key. ``values()`` is what the graph computes with.

    A tensor is trained in units of its own size, one for each output of a weight: where batch normalization
    was folded in, channels differ by orders of magnitude, and steps of one size would ruin the small and not
    move the large. Units are powers of two, so that what is not trained stays what it was to the last bit.

    Zeros of a weight stay zeros (a mask), and a weight of few different values keeps which value stands
    where: its centroids are trained, each by the sum of the gradients of its places (Han et al., 2016). Where
    the values are integers times a scale for each output, as clustering leaves them, the integers and the
    scales are trained apart, and the values stay integers times a scale.
    """

    trained: dict[str, Trainable]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    """One where a weight is, zero where it is not."""
    places: dict[str, Tensor] = field(default_factory=dict)
    """Of shared values: the index of the centroid at each place."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Of weights on a grid (``codebook_scales``): the scale of each output at the start. What is
    trained is its logarithm, under :func:`scale_key`."""
    apart: list[str] = field(default_factory=list)
    """Keys of tensors that are no constants of the model: what a form of it trains besides."""
    returning: bool = False
    """Whether weights that a mask removes go on learning, so that they may come back."""

    def values(self) -> dict[str, Tensor]:
        """The weights as the graph reads them; gradients reach the trained tensors."""
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
        """Train ``tensor`` as well, as it is."""
        self.apart.append(key)
        self.tensors[key] = tensor.requires_grad_()

    def fade(self, share: float) -> None:
        """Draw weights that masks remove towards zero, by a share of what they are (Zhou et al., 2021)."""
        with torch.no_grad():
            for key, mask in self.masks.items():
                self.tensors[key].mul_(1 - share * (1 - mask))

    def scale(self, key: str) -> Tensor | None:
        """The scales of a weight on a grid, one an output."""
        start = self.scales.get(key)
        return None if start is None else start * self.tensors[scale_key(key)].exp()

    def arrays(self) -> dict[str, Array]:
        """Copies of the weights, for writing back, of the scales of grids under :func:`scale_key`, and of
        what is trained besides."""
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
        """Keys of what is pruned and regularised."""
        return [key for key, trained in self.trained.items() if trained.kind is Kind.WEIGHT]


def hold(model: ir.Model, keep: Sequence[str] = ()) -> Parameters:
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
    held = Parameters(chosen)
    values = {key: value for value, key in keys_of(model).items()}
    for key in chosen:
        array, grid = array_of(values[key]), values[key].meta.get(KEY)
        if grid is None or not _add_on_grid(held, key, array, grid):
            _add(held, key, array)
    return held


def scale_key(key: str) -> str:
    """What the scales of a weight on a grid go by."""
    return f"{key} scale"


def _codes(values: Tensor) -> Tensor:
    """The nearest integers that int8 holds."""
    return round_through(values).clamp(-MOST_CODE, MOST_CODE)


def _add_on_grid(held: Parameters, key: str, array: Array, grid: Array) -> bool:
    """Hold a weight as integers and scales, if it is what its grid says: another pass may have moved it."""
    shape, axis = held.trained[key].shape, held.trained[key].output_axis
    if not shape or grid.shape != (shape[axis],):
        return False
    along = np.moveaxis(np.broadcast_to(grid, (*np.delete(shape, axis), shape[axis])), -1, axis)
    codes, places = np.unique(np.rint(array / along), return_inverse=True)
    if np.abs(codes).max(initial=0) > MOST_CODE or not np.array_equal(
        codes[places].reshape(shape) * along, array
    ):
        return False
    kept = as_tensor(np.asarray(codes != 0, np.float32))
    held.places[key] = as_tensor(places.reshape(-1))
    held.scales[key] = as_tensor(grid)
    _put(held, key, as_tensor(codes), _power_of_two(as_tensor(codes[codes != 0]).square().mean()))
    held.tensors[key].register_hook(lambda gradient: gradient * kept)  # zeros stay zeros
    _put(held, scale_key(key), torch.zeros(len(grid)), torch.ones(()))
    return True


def _add(held: Parameters, key: str, array: Array) -> None:
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


def _put(held: Parameters, key: str, tensor: Tensor, unit: Tensor) -> None:
    held.units[key] = unit
    held.tensors[key] = (tensor / unit).requires_grad_()
