"""A network run on an interval: its operations in order, with what each was given and what it gave.

The network is any `LogitsFn`: JAX says of which primitives it is made (`jax.make_jaxpr`), and `rules` what these do to
intervals. No layer is defined a second time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxnets.certificates.rules import AFFINE, BILINEAR, ENTRYWISE, OTHERS, Interval, Operand
from jaxnets.models.layers.convolution import conv_general_dilated, is_plain
from jaxnets.types import Array, LogitsFn

_CALLS = {
    "checkpoint": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "jit": "jaxpr", "remat2": "jaxpr",
}  # fmt: skip
"""Operations that are functions, and the parameter that holds them."""


class Step(NamedTuple):
    """One operation.

    Attributes:
      bind: it, on arrays.
      operands: intervals, and arrays where they do not depend on the input.
      results: intervals.
      affine: whether it is, in its operands that are intervals.
      maximum: the two operands of which the result is the greater one, entry by entry; else None.
    """

    bind: Callable[..., Any]
    operands: list[Operand]
    results: list[Interval]
    affine: bool
    maximum: tuple[Operand, Operand] | None


class Tape(NamedTuple):
    """The steps from the input to the logits of one row, ``[1, K]``."""

    input: Interval
    steps: list[Step]
    logits: Interval


def record(logits_fn: LogitsFn, lower: Array, upper: Array, norm: float = jnp.inf) -> Tape:
    """Runs a network on everything between ``lower`` and ``upper``, which are one row ``[...]``, or the ball in it.

    Raises:
      NotImplementedError: for an operation that has no rule.
      ValueError: where the logits are not ``[1, K]``.
    """
    row, steps = Interval(lower[None], upper[None], norm=norm), []

    def network(x: Array) -> Array:
        logits = logits_fn(x)
        if logits.ndim != 2 or len(logits) != 1:
            raise ValueError(f"logits_fn must return [B, K] with B = 1 row as x has, got {list(logits.shape)}")
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    closed = jax.make_jaxpr(network)(row.lower)
    [logits] = _run(closed.jaxpr, closed.consts, [row], steps)
    return Tape(row, steps, logits if isinstance(logits, Interval) else Interval(logits, logits))


def check_precision(tape: Tape) -> None:
    """Raises ValueError for a network that computes in less than single precision."""
    dtypes = {result.lower.dtype for step in tape.steps for result in step.results}
    narrow = sorted(str(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4)
    if narrow:
        raise ValueError(
            f"the network computes in {', '.join(narrow)}, whose rounding no bound accounts for: certify it in float32"
        )


def _run(jaxpr: Any, constants: Any, arguments: list[Operand], steps: list[Step]) -> list[Operand]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        results = _apply(equation, [read(atom) for atom in equation.invars], steps)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, operands: list[Operand], steps: list[Step]) -> list[Operand]:
    primitive, name = equation.primitive, equation.primitive.name
    bind = _bind(equation)
    if not any(isinstance(operand, Interval) for operand in operands):
        # What does not depend on the input is computed as it is, by its own derivatives.
        results = bind(*operands)
        return list(results) if primitive.multiple_results else [results]
    if name in _CALLS:
        called = equation.params[_CALLS[name]]
        return _run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), operands, steps)
    rule = AFFINE.get(name) or BILINEAR.get(name) or OTHERS.get(name)
    if rule is None or any(jnp.issubdtype(variable.aval.dtype, jnp.integer) for variable in equation.outvars):
        raise NotImplementedError(
            f"there is no interval rule for the operation {name!r}, which this network does to "
            f"{', '.join(str(atom.aval) for atom in equation.invars)}: write the layer with operations that "
            "jaxnets.certificates.rules lists, or certify the network by randomized smoothing, which takes any"
        )
    found = rule(bind, *operands)
    results = found if isinstance(found, list) else [found]
    known = [result for result in results if isinstance(result, Interval)]
    affine = _is_affine(name, operands, known)
    if affine and name in ENTRYWISE:
        results = known = [replace(known[0], norm=_norm(name, operands, known[0]))]
    if known:
        steps.append(Step(bind, operands, known, affine, _maximum(name, operands)))
    return results


def _bind(equation: Any) -> Callable[..., Any]:
    """The operation on arrays: of a convolution that the layers know too, theirs, whose gradients are fast on CPUs."""
    primitive, params = equation.primitive, equation.params
    if primitive.name == "conv_general_dilated":
        ones = (*params["lhs_dilation"], *params["rhs_dilation"], params["feature_group_count"])
        dtypes = {variable.aval.dtype for variable in (*equation.invars, *equation.outvars)}
        if len(dtypes) == 1 and is_plain(params["dimension_numbers"], *ones, params["batch_group_count"]):
            names = ("window_strides", "padding", "precision")
            return partial(conv_general_dilated, **{name: params[name] for name in names})
    return partial(primitive.bind, **primitive.get_bind_params(params))


def _is_affine(name: str, operands: list[Operand], results: list[Interval]) -> bool:
    bounded = [operand for operand in operands if isinstance(operand, Interval)]
    if not all(jnp.issubdtype(value.lower.dtype, jnp.inexact) for value in [*bounded, *results]):
        # Bools: a choice by one that depends on the input is not affine, one by a constant is.
        return False
    if name == "div" and isinstance(operands[1], Interval):
        return False
    return name in AFFINE or name == "select_n" or (name in BILINEAR and len(bounded) == 1)


def _norm(name: str, operands: list[Operand], result: Interval) -> float:
    """That of the one operand that is an interval, unless its entries are repeated: copies are longer together."""
    one, *more = (operand for operand in operands if isinstance(operand, Interval))
    repeated = operands[0] is not one if name == "pad" else result.lower.size > one.lower.size
    return np.inf if more or repeated else one.norm


def _maximum(name: str, operands: list[Operand]) -> tuple[Operand, Operand] | None:
    if name == "max":
        return operands[0], operands[1]
    if name == "select_n" and isinstance(operands[0], Interval) and operands[0].greater is not None:
        (no, yes), (a, b) = operands[1:], operands[0].greater
        return (yes, no) if yes is a and no is b else None
    return None
