"""jaxnets with the steps of attacks one after the other instead of in a loop: a program as many times as long."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax.numpy as jnp

from benchmarks.networks import Loaded
from benchmarks.sides import jaxnets
from benchmarks.work import Work


def make(work: Work, loaded: Loaded) -> Callable[[], Any]:
    call = jaxnets.make(work, loaded)

    def unrolled() -> Any:
        with mock.patch("jax.lax.fori_loop", _one_after_the_other):
            return call()

    return unrolled


def _one_after_the_other(lower: int, upper: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    for number in range(lower, upper):
        carry = body(jnp.asarray(number), carry)
    return carry
