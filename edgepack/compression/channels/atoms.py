"""Which channels of a model must live or die together.

Every position along the channel axis of a value has an *atom*. Operators hand atoms on (activations, pools,
transpositions), tie those of several values to each other (additions, gates, depthwise convolutions), put
them into new order (concatenations, splits, channel shuffles) or pin them: atoms that reach a graph output,
or an operator that works across channels, must stay. What is tied is one *class* (union-find).

Given::

    x -> Conv(w [4, 3, 1, 1]) -> h;  h -> Conv(d [4, 1, 3, 3], group 4) -> k
    Concat(h, k) -> c;  c -> Conv(v [5, 8, 1, 1]) -> y

Result: ``h`` has atoms 0 1 2 3, ``k`` the same, ``c`` has 0 1 2 3 0 1 2 3, ``y`` has pinned atoms of its own.

Dependency groups of whole layers: G. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023; atoms
keep apart what a group of layers would tie together.
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
    """Where a value has channels: the axis, and the atom of each position there."""

    axis: int
    atoms: Atoms


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Axis ``axis`` of the constant operand ``index`` of ``node`` has an element for each of ``atoms``."""

    node: ir.Node
    index: int
    axis: int
    atoms: Atoms


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """What multiplies: its multiplications are proportional to the channels left of each of ``factors``."""

    node: ir.Node
    factors: tuple[Atoms, ...]


@dataclass(slots=True, eq=False)
class Channels:
    """What is known of the channels of a model. Atoms that are tied have the same :meth:`root`."""

    tracks: dict[ir.Value, Track] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    readers: list[tuple[ir.Node, Atoms]] = field(default_factory=list)
    """Nodes whose weights mix the channels that they read, and the atoms of those."""
    makers: list[tuple[ir.Node, Atoms]] = field(default_factory=list)
    """Nodes whose weights make channels, and the atoms of those."""
    parents: list[int] = field(default_factory=list)
    pins: dict[int, str] = field(default_factory=dict)
    """Why an atom must stay."""

    def fresh(self, count: int) -> Atoms:
        """New atoms."""
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, atom: int) -> int:
        """The one that stands for all atoms tied to ``atom``."""
        while self.parents[atom] != atom:
            self.parents[atom] = self.parents[self.parents[atom]]
            atom = self.parents[atom]
        return atom

    def roots(self) -> Atoms:
        """The root of each atom."""
        return np.fromiter((self.root(a) for a in range(len(self.parents))), np.intp, len(self.parents))

    def tie(self, left: Atoms, right: Atoms) -> None:
        """Each atom of ``left`` with its counterpart."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            first, second = self.root(a), self.root(b)
            self.parents[second] = first

    def tie_rows(self, table: Atoms) -> Atoms:
        """All atoms of each row with each other; gives one of each row."""
        for column in table.T[1:]:
            self.tie(table[:, 0], column)
        return table[:, 0]

    def track(self, value: ir.Value, axis: int, atoms: Atoms) -> None:
        """From now on ``value`` has ``atoms`` along ``axis``."""
        self.tracks[value] = Track(axis, atoms)

    def size(self, value: ir.Value, axis: int) -> int | None:
        """The size of an axis, where it is known."""
        if value.shape is None or not 0 <= axis < len(value.shape):
            return None
        found = value.shape[axis]
        return found if isinstance(found, int) else None

    def pin(self, value: ir.Value | None, reason: str) -> None:
        """The channels of ``value``, if it has any, must stay."""
        track = None if value is None else self.tracks.get(value)
        if track is not None:
            self.pin_atoms(track.atoms, reason)

    def pin_atoms(self, atoms: Atoms, reason: str) -> None:
        """These atoms must stay."""
        for atom in atoms.tolist():
            self.pins.setdefault(atom, reason)

    def pin_inputs(self, node: ir.Node, why: str) -> None:
        """The channels of all that ``node`` reads must stay."""
        for value in node.inputs:
            self.pin(value, f"{label(node)} {why}")

    def cut(self, node: ir.Node, index: int, axis: int, atoms: Atoms) -> None:
        """Note that a constant operand goes with ``atoms``; an operand that is not there is none."""
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
    """How messages call a node."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def is_constant(value: ir.Value | None) -> bool:
    """Whether an operand is constant or not there."""
    return value is None or constant(value) is not None


def output_axis(node: ir.Node) -> int:
    """The axis of a weight that its outputs are on."""
    if node.op_type in ("ConvTranspose", "MatMul"):
        return 1
    return 1 if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Layers whose channels cannot be chosen apart: ``classes`` of atoms that may go, each a root."""

    name: str
    """Of the first node that makes the channels."""
    makers: tuple[ir.Node, ...]
    widest: Atoms
    """Roots of the channels of the maker with the most of them."""
    classes: Atoms
    pinned: str
    """Why the others must stay, if there are others."""


def find_groups(channels: Channels, keep: frozenset[str] = frozenset()) -> tuple[Group, ...]:
    """Groups in the order of the graph. Channels that the nodes named ``keep`` make are left alone."""
    for node, atoms in channels.makers:
        if node.name in keep:
            channels.pin_atoms(atoms, f"{label(node)} is kept")
    unread = np.ones(len(channels.parents), np.bool_)
    roots = channels.roots()
    for _, atoms in channels.readers:
        unread[roots[atoms]] = False
    reasons = {int(roots[atom]): why for atom, why in channels.pins.items()}
    found: list[Group] = []
    for members in _sharing(channels, roots):
        classes = np.unique(np.concatenate([roots[atoms] for _, atoms in members]))
        pinned = [
            reasons.get(int(c)) or ("no weights read its channels" if unread[c] else "") for c in classes
        ]
        widest = max((roots[atoms] for _, atoms in members), key=len)
        free = classes[[not reason for reason in pinned]]
        why = next((reason for reason in pinned if reason), "")
        makers = tuple(node for node, _ in members)
        found.append(Group(makers[0].name or "", makers, widest, free, why))
    return tuple(found)


def _sharing(channels: Channels, roots: Atoms) -> list[list[tuple[ir.Node, Atoms]]]:
    """The makers, those together that share a class."""
    owner: dict[int, int] = {}
    sets: dict[int, list[tuple[ir.Node, Atoms]]] = {}
    for place, (node, atoms) in enumerate(channels.makers):
        mine = [(node, atoms)]
        for other in {owner[c] for c in roots[atoms].tolist() if c in owner}:
            mine = sets.pop(other) + mine
        sets[place] = mine
        for _, shared in mine:
            owner.update(dict.fromkeys(roots[shared].tolist(), place))
    return list(sets.values())


def tracked(found: Channels, node: ir.Node) -> tuple[ir.Value, Track, int] | None:
    """The first input, its channels and its rank; others are pinned, and all are where that is unknown."""
    x = node.inputs[0]
    for value in node.inputs[1:]:
        found.pin(value, f"{label(node)} reads it as a setting")
    if x is None or x.shape is None or x not in found.tracks:
        return None
    return x, found.tracks[x], len(x.shape)


def numbers(node: ir.Node, index: int, attribute: str = "") -> list[int] | None:
    """Integers in a constant operand, or in an attribute that took its place in older opsets."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        found = node.attributes.get_ints(attribute, ()) if attribute else ()
        return list(found) or None
    held = constant(value)
    return None if held is None else [int(n) for n in held.reshape(-1)]
