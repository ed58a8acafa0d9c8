"""RNN, GRU and LSTM, step by step, with all attributes and optional inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgepack.training.step import Operator, Step

Function = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State], State]
"""``cell(x, state)`` returns the next state; its first tensor is the output."""


def _activation(name: str, alpha: float | None, beta: float | None) -> Function:
    """One of the activations that the attribute ``activations`` can name, with its parameters."""

    def of(default: float, given: float | None) -> float:
        return default if given is None else given

    table: dict[str, Function] = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "affine": lambda x: of(1.0, alpha) * x + of(0.0, beta),
        "leakyrelu": lambda x: functional.leaky_relu(x, of(0.01, alpha)),
        "thresholdedrelu": lambda x: torch.where(x >= of(1.0, alpha), x, torch.zeros_like(x)),
        "scaledtanh": lambda x: of(1.0, alpha) * torch.tanh(of(1.0, beta) * x),
        "hardsigmoid": lambda x: (of(0.2, alpha) * x + of(0.5, beta)).clamp(0, 1),
        "elu": lambda x: functional.elu(x, of(1.0, alpha)),
        "softsign": functional.softsign,
        "softplus": functional.softplus,
    }
    return table[name.lower()]


def _activations(step: Step, direction: int, defaults: tuple[str, ...]) -> list[Function]:
    """The activation functions of one direction, with clipped inputs."""
    count = len(defaults)
    names = list(step.get("activations") or defaults * 2)[direction * count :][:count]
    limit = step.get("clip")

    def parameter(key: str, index: int) -> float | None:
        given = step.get(key) or []
        place = direction * count + index
        return given[place] if place < len(given) else None

    found = []
    for index, name in enumerate(names):
        function = _activation(
            name, parameter("activation_alpha", index), parameter("activation_beta", index)
        )
        found.append(function if limit is None else _clipped(function, limit))
    return found


def _clipped(function: Function, limit: float) -> Function:
    return lambda x: function(x.clamp(-limit, limit))


def _rnn_cell(step: Step, w: Tensor, r: Tensor, b: Tensor, direction: int, _: Tensor | None) -> Cell:
    (f,) = _activations(step, direction, ("Tanh",))
    both = b[: len(w)] + b[len(w) :]
    return lambda x, state: (f(functional.linear(x, w, both) + state[0] @ r.t()),)


def _gru_cell(step: Step, w: Tensor, r: Tensor, b: Tensor, direction: int, _: Tensor | None) -> Cell:
    f, g = _activations(step, direction, ("Sigmoid", "Tanh"))
    size = len(w) // 3
    outer, inner = b[: 3 * size], b[3 * size :]
    linear = bool(step.get("linear_before_reset", 0))
    gates, candidate = r[: 2 * size], r[2 * size :]

    def cell(x: Tensor, state: State) -> State:
        (h,) = state
        given = functional.linear(x, w, outer)
        update, reset = f(given[:, : 2 * size] + functional.linear(h, gates, inner[: 2 * size])).chunk(2, 1)
        if linear:
            recalled = reset * functional.linear(h, candidate, inner[2 * size :])
        else:
            recalled = functional.linear(reset * h, candidate, inner[2 * size :])
        new = g(given[:, 2 * size :] + recalled)
        return ((1 - update) * new + update * h,)

    return cell


def _lstm_cell(step: Step, w: Tensor, r: Tensor, b: Tensor, direction: int, peep: Tensor | None) -> Cell:
    f, g, h_function = _activations(step, direction, ("Sigmoid", "Tanh", "Tanh"))
    size = len(w) // 4
    both = b[: 4 * size] + b[4 * size :]
    coupled = bool(step.get("input_forget", 0))
    p_in, p_out, p_forget = (0, 0, 0) if peep is None else peep.chunk(3)

    def cell(x: Tensor, state: State) -> State:
        h, c = state
        i, o, forget, new = (functional.linear(x, w, both) + h @ r.t()).chunk(4, 1)
        i = f(i + p_in * c)
        forget = 1 - i if coupled else f(forget + p_forget * c)
        c = forget * c + i * g(new)
        return f(o + p_out * c) * h_function(c), c

    return cell


def _turned(x: Tensor, lengths: Tensor) -> Tensor:
    """The first ``lengths`` positions of each sample of ``x`` [time, batch, ...] in reverse order."""
    positions = torch.arange(len(x))[:, None]
    places = torch.where(positions < lengths, lengths - 1 - positions, positions)
    return x.gather(0, places[:, :, None].expand_as(x))


def _run(cell: Cell, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
    outputs = []
    for time, now in enumerate(x):
        after = cell(now, state)
        if lengths is None:
            state = after
            outputs.append(state[0])
            continue
        live = (time < lengths)[:, None]
        outputs.append(torch.where(live, after[0], torch.zeros_like(after[0])))
        state = tuple(torch.where(live, new, old) for new, old in zip(after, state, strict=True))
    return torch.stack(outputs), state


def _recurrent(make: Any, gates: int, states: int) -> Operator:
    def operator(
        step: Step,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        lengths: Tensor | None = None,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        by_batch, directions = bool(step.get("layout", 0)), len(w)
        size, batch = r.shape[2], x.shape[0] if by_batch else x.shape[1]
        x = x.transpose(0, 1) if by_batch else x
        given = [*rest, None, None, None]
        peep = given[states]
        finals: list[State] = []
        outputs = []
        for d in range(directions):
            start = tuple(
                torch.zeros(batch, size, dtype=x.dtype) if s is None else (s[:, d] if by_batch else s[d])
                for s in given[:states]
            )
            bias = torch.zeros(2 * gates * size, dtype=x.dtype) if b is None else b[d]
            cell = make(step, w[d], r[d], bias, d, None if peep is None else peep[d])
            backwards = step.get("direction", "forward") == "reverse" or d == 1
            whole = torch.full((batch,), len(x)) if lengths is None else lengths.long()
            limits = None if lengths is None else lengths.long()
            y, final = _run(cell, _turned(x, whole) if backwards else x, start, limits)
            outputs.append(_turned(y, whole) if backwards else y)
            finals.append(final)
        y = torch.stack(outputs, 1)
        ends = [torch.stack(s, 1 if by_batch else 0) for s in zip(*finals, strict=True)]
        return (y.permute(2, 0, 1, 3) if by_batch else y, *ends)

    return operator


OPERATORS: dict[str, Operator] = {
    "GRU": _recurrent(_gru_cell, 3, 1),
    "LSTM": _recurrent(_lstm_cell, 4, 2),
    "RNN": _recurrent(_rnn_cell, 1, 1),
}
