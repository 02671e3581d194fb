"""How a network is called, and what it calls in turn: how weights from elsewhere are laid against its layers."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.types import Params, Stats

Path = tuple[str, ...]


class Calls(NamedTuple):
    """A network as it is called on one image.

    Attributes:
      params, stats: its variables, as shapes alone.
      channels: for the path of each module, in order of call, the channels of the last image before it; None where a
        dense layer came since.
    """

    params: Params
    stats: Stats
    channels: dict[Path, int | None]


def mode(module: nn.Module, *, training: bool) -> dict[str, Any]:
    """Of ``train``, ``training`` and their opposite ``deterministic`` those that ``__call__`` takes."""
    said = {"train": training, "training": training, "deterministic": not training}
    return {name: said[name] for name in inspect.signature(type(module).__call__).parameters if name in said}


def calls(module: nn.Module, image: tuple[int, ...]) -> Calls:
    """Traces ``module`` on one image ``[H, W, C]``, or one input of another shape; nothing is computed.

    Raises:
      TypeError: where it is no Linen module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the network must be a module of Flax's Linen, as in jaxnets.models, got {type(module)}")
    seen: dict[Path, int | None] = {}
    channels = None

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal channels
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        channels = _channels(args[0] if args else None, channels)
        seen.setdefault(context.module.path, channels)
        out = call(*args, **kwargs)
        channels = _channels(out, None if isinstance(context.module, nn.Dense) else channels)
        return out

    with nn.intercept_methods(watch):
        x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
        init = partial(module.init, **mode(module, training=False))
        variables = dict(jax.eval_shape(init, jax.random.key(0), x))
    return Calls(variables.pop("params", {}), variables, seen)


def _channels(x: Any, otherwise: int | None) -> int | None:
    """Of an image ``[B, H, W, C]``."""
    return x.shape[3] if getattr(x, "ndim", 0) == 4 else otherwise
