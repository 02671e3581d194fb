"""Products of two arrays, such as convolutions, with tangents of our own making."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from jaxnets.types import Array

Product = Callable[[Array, Array], Array]


def bilinear(product: Product, of_lhs: Product, of_rhs: Product) -> Product:
    """``product(lhs, rhs)``, with the tangent ``of_lhs(lhs_dot, rhs) + of_rhs(lhs, rhs_dot)``.

    The two are the product again, written so that their transposes, which gradients are made of, are fast. One of an
    operand that does not vary is not computed.
    """

    @jax.custom_jvp
    def multiply(lhs: Array, rhs: Array) -> Array:
        return product(lhs, rhs)

    @partial(multiply.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
        parts = []
        if not isinstance(lhs_dot, SymbolicZero):
            parts.append(of_lhs(lhs_dot, rhs))
        if not isinstance(rhs_dot, SymbolicZero):
            parts.append(of_rhs(lhs, rhs_dot))
        return multiply(lhs, rhs), sum(parts[1:], start=parts[0])

    return multiply
