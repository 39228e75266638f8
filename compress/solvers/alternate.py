"""Codes and low-rank factors found in turn, so that each takes what the other holds badly.

Rounds of "quantize W - B A" and "decompose W - dequant(codes)" run from two starts: the codes
that are there (LoftQ, arXiv:2310.08659, algorithm 1) and the leading part of W itself (PiSSA,
arXiv:2404.02948, as QPiSSA). The best state seen is kept, the plain residual among them, so the
result never loses to it. Where the inputs are known, "best" is said of the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.tensor import Array, Codes, Factors

Matrix = NDArray[np.float32]
Places = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows and columns of single entries

# A start is given up when a round gains less than this share of the squared error.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class State:
    """Codes, factors and the squared errors they leave, protected entries exact.

    squared_error       of dequant(codes) + B A, with the factors as stored
    base_squared_error  of dequant(codes) alone
    loss, base_loss     the same as they are weighed (`Problem.weigh`)
    rounds              alternations it took; 0: the codes as they were
    from_weights        whether it began with the leading part of W
    """

    codes: Codes
    factors: Factors
    squared_error: float
    base_squared_error: float
    loss: float
    base_loss: float
    rounds: int = 0
    from_weights: bool = False


@dataclass(frozen=True)
class Problem:
    """One matrix with the means to quantize and to decompose.

    weights     [rows, columns] in a type that kernels read
    exact       places whose value is stored beside: no error there, whatever the codes say
    requantize  float32 matrix -> codes, under the tensor's mask
    factorise   float32 matrix -> rounded factors
    weigh       float32 error -> what it costs; None: its squared norm
    """

    weights: Array
    exact: Places | None
    requantize: Callable[[Matrix], Codes]
    factorise: Callable[[Matrix], Factors]
    weigh: Callable[[Matrix], float] | None = None

    def repair(self, codes: Codes, rounds: int = 0, from_weights: bool = False) -> State:
        """The factors of what the codes left over, measured as they are stored."""
        factors = self.factorise(self._residual(codes))
        base = codes.dequantize()  # again: held meanwhile it would cost as much as the residual
        self._set_exact(base, self.weights)
        base_error = self._errors(base)
        factors.add_to(base)
        self._set_exact(base, self.weights)
        error = self._errors(base)
        return State(
            codes, factors, error[0], base_error[0], error[1], base_error[1], rounds, from_weights
        )

    def without(self, factors: Factors) -> Matrix:
        """W - B A: what is left for the codes; protected entries keep their value."""
        product = np.zeros(self.weights.shape, np.float32)
        factors.add_to(product)
        np.subtract(self.weights, product, out=product)
        self._set_exact(product, self.weights)
        return product

    def base_loss(self, codes: Codes) -> float:
        """What the codes alone cost, protected entries exact."""
        base = codes.dequantize()
        self._set_exact(base, self.weights)
        return self._errors(base)[1]

    def _residual(self, codes: Codes) -> Matrix:
        residual = codes.dequantize()
        np.subtract(self.weights, residual, out=residual)
        self._set_exact(residual, None)
        return residual

    def _set_exact(self, matrix: Matrix, values: Array | None) -> None:
        if self.exact is not None:
            matrix[self.exact] = 0 if values is None else values[self.exact]

    def _errors(self, decoded: Matrix) -> tuple[float, float]:
        """(squared error, loss)."""
        sums = np.zeros(2, np.float64)
        kernels.error_sums(self.weights, decoded, sums)
        error = float(sums[0])
        if self.weigh is None:
            return error, error
        return error, self.weigh(np.subtract(self.weights, decoded, dtype=np.float32))


def alternate(
    problem: Problem, codes: Codes, rounds: int, *, base_limit: float | None = None
) -> State:
    """The best of the plain residual and of `rounds` alternations from either start.

    With `base_limit`, a state whose base alone has a larger loss is not chosen: that base must be
    usable without its adapter.
    """
    best = problem.repair(codes)
    if rounds < 1:
        return best
    for states in (
        _rounds(problem, best, range(1, rounds + 1), from_weights=False),
        _from_weights(problem, rounds),
    ):
        last = np.inf
        for state in states:
            allowed = base_limit is None or state.base_loss <= base_limit
            if allowed and state.loss < best.loss:
                best = state
            # A start whose base cannot stand does not come back to one that can.
            if not allowed or state.loss > last * (1 - _LEAST_GAIN):
                break
            last = state.loss
    return best


def _rounds(problem: Problem, state: State, numbers: range, from_weights: bool) -> Iterator[State]:
    for number in numbers:
        codes = problem.requantize(problem.without(state.factors))
        state = problem.repair(codes, number, from_weights)
        yield state


def _from_weights(problem: Problem, rounds: int) -> Iterator[State]:
    """The start that gives the factors the leading part of W, and the codes the rest."""
    leading = problem.factorise(problem.weights.astype(np.float32))
    state = problem.repair(problem.requantize(problem.without(leading)), 1, from_weights=True)
    yield state
    yield from _rounds(problem, state, range(2, rounds + 1), from_weights=True)
