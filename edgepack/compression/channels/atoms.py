"""Channel dependencies: which channels of a model must be kept or removed together.

Every position along the channel axis of a value has an *atom*. Operators pass atoms on (activations, pooling,
Transpose), merge those of several values (Add, Mul, depthwise convolutions), reorder them (Concat, Split,
channel shuffles) or pin them: atoms that reach a graph output, or an operator that mixes channels, must stay.
Merged atoms form one *class* (union-find).

Given::

    x -> Conv(w [4, 3, 1, 1]) -> h;  h -> Conv(d [4, 1, 3, 3], group 4) -> k
    Concat(h, k) -> c;  c -> Conv(v [5, 8, 1, 1]) -> y

Result: ``h`` has atoms 0 1 2 3, ``k`` the same, ``c`` has 0 1 2 3 0 1 2 3, ``y`` has pinned atoms of its own.

G. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, has dependency groups of whole layers; atoms
are finer.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepack.ir.model import constant

Atoms = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """The channel axis of a value, and the atom of each position."""

    axis: int
    atoms: Atoms


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Axis ``axis`` of the constant operand ``index`` of ``node`` has one element for each of ``atoms``."""

    node: ir.Node
    index: int
    axis: int
    atoms: Atoms


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A layer whose multiplications are proportional to the remaining channels of each of ``factors``."""

    node: ir.Node
    factors: tuple[Atoms, ...]


@dataclass(slots=True, eq=False)
class Channels:
    """The channels of a model. Merged atoms have the same :meth:`root`."""

    tracks: dict[ir.Value, Track] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    consumers: list[tuple[ir.Node, Atoms]] = field(default_factory=list)
    """Nodes whose weights consume channels, with the atoms of these."""
    producers: list[tuple[ir.Node, Atoms]] = field(default_factory=list)
    """Nodes whose weights produce channels, with the atoms of these."""
    parents: list[int] = field(default_factory=list)
    pins: dict[int, str] = field(default_factory=dict)
    """Why an atom must stay."""

    def fresh(self, count: int) -> Atoms:
        """New atoms."""
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, atom: int) -> int:
        """The representative of the class of ``atom``."""
        while self.parents[atom] != atom:
            self.parents[atom] = self.parents[self.parents[atom]]
            atom = self.parents[atom]
        return atom

    def roots(self) -> Atoms:
        """The root of each atom."""
        return np.fromiter((self.root(a) for a in range(len(self.parents))), np.intp, len(self.parents))

    def tie(self, left: Atoms, right: Atoms) -> None:
        """Merge each atom of ``left`` with the atom of ``right`` at the same position."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            first, second = self.root(a), self.root(b)
            self.parents[second] = first

    def tie_rows(self, table: Atoms) -> Atoms:
        """Merge the atoms of each row; return one atom of each row."""
        for column in table.T[1:]:
            self.tie(table[:, 0], column)
        return table[:, 0]

    def track(self, value: ir.Value, axis: int, atoms: Atoms) -> None:
        """Record that ``value`` has ``atoms`` along ``axis``."""
        self.tracks[value] = Track(axis, atoms)

    def size(self, value: ir.Value, axis: int) -> int | None:
        """The size of an axis, if it is known."""
        if value.shape is None or not 0 <= axis < len(value.shape):
            return None
        found = value.shape[axis]
        return found if isinstance(found, int) else None

    def pin(self, value: ir.Value | None, reason: str) -> None:
        """Pin the channels of ``value``, if it has any."""
        track = None if value is None else self.tracks.get(value)
        if track is not None:
            self.pin_atoms(track.atoms, reason)

    def pin_atoms(self, atoms: Atoms, reason: str) -> None:
        """Pin these atoms."""
        for atom in atoms.tolist():
            self.pins.setdefault(atom, reason)

    def pin_inputs(self, node: ir.Node, why: str) -> None:
        """Pin the channels of all inputs of ``node``."""
        for value in node.inputs:
            self.pin(value, f"{label(node)} {why}")

    def cut(self, node: ir.Node, index: int, axis: int, atoms: Atoms) -> None:
        """Record that a constant operand has one element for each of ``atoms``; absent operands are
        ignored."""
        if index < len(node.inputs) and node.inputs[index] is not None:
            self.cuts.append(Cut(node, index, axis, atoms))

    def at(self, node: ir.Node, value: ir.Value | None, axis: int) -> Atoms | None:
        """The atoms of ``value`` along ``axis``; channels along another axis are pinned."""
        track = None if value is None else self.tracks.get(value)
        if track is not None and track.axis != axis:
            self.pin(value, f"{label(node)} has its channels along another axis")
            return None
        return None if track is None else track.atoms


def label(node: ir.Node) -> str:
    """The name of a node in messages."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def is_constant(value: ir.Value | None) -> bool:
    """Whether an operand is constant or absent."""
    return value is None or constant(value) is not None


def output_axis(node: ir.Node) -> int:
    """The output axis of a weight."""
    if node.op_type in ("ConvTranspose", "MatMul"):
        return 1
    return 1 if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Layers whose channels are pruned together: prunable ``classes`` of atoms, each given by its root."""

    name: str
    """Name of the first node that produces the channels."""
    producers: tuple[ir.Node, ...]
    widest: Atoms
    """Roots of the channels of the node that produces the most of them."""
    classes: Atoms
    pinned: str
    """Why the other classes are pinned; empty without any."""


def find_groups(channels: Channels, keep: frozenset[str] = frozenset()) -> tuple[Group, ...]:
    """Groups in the order of the graph. Channels that the nodes named in ``keep`` produce are pinned."""
    for node, atoms in channels.producers:
        if node.name in keep:
            channels.pin_atoms(atoms, f"{label(node)} is excluded by `keep`")
    unread = np.ones(len(channels.parents), np.bool_)
    roots = channels.roots()
    for _, atoms in channels.consumers:
        unread[roots[atoms]] = False
    reasons = {int(roots[atom]): why for atom, why in channels.pins.items()}
    found: list[Group] = []
    for members in _sharing(channels, roots):
        classes = np.unique(np.concatenate([roots[atoms] for _, atoms in members]))
        pinned = [
            reasons.get(int(c)) or ("no weights consume its channels" if unread[c] else "") for c in classes
        ]
        widest = max((roots[atoms] for _, atoms in members), key=len)
        free = classes[[not reason for reason in pinned]]
        why = next((reason for reason in pinned if reason), "")
        producers = tuple(node for node, _ in members)
        found.append(Group(producers[0].name or "", producers, widest, free, why))
    return tuple(found)


def _sharing(channels: Channels, roots: Atoms) -> list[list[tuple[ir.Node, Atoms]]]:
    """The producers, grouped by shared classes."""
    owner: dict[int, int] = {}
    sets: dict[int, list[tuple[ir.Node, Atoms]]] = {}
    for place, (node, atoms) in enumerate(channels.producers):
        mine = [(node, atoms)]
        for other in {owner[c] for c in roots[atoms].tolist() if c in owner}:
            mine = sets.pop(other) + mine
        sets[place] = mine
        for _, shared in mine:
            owner.update(dict.fromkeys(roots[shared].tolist(), place))
    return list(sets.values())


def tracked(found: Channels, node: ir.Node) -> tuple[ir.Value, Track, int] | None:
    """The first input with its channels and rank; pins other inputs, and all if the rank is unknown."""
    x = node.inputs[0]
    for value in node.inputs[1:]:
        found.pin(value, f"{label(node)} takes it as a parameter")
    if x is None or x.shape is None or x not in found.tracks:
        return None
    return x, found.tracks[x], len(x.shape)


def numbers(node: ir.Node, index: int, attribute: str = "") -> list[int] | None:
    """Integers of a constant operand, or of the attribute in older opsets."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        found = node.attributes.get_ints(attribute, ()) if attribute else ()
        return list(found) or None
    content = constant(value)
    return None if content is None else [int(n) for n in content.reshape(-1)]
