"""The bridge from Flax: a network as a tuple of pure functions, and one behind a layer that normalises."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.tree_util import Partial

from jaxnets.models.calls import mode
from jaxnets.types import Array, Params, Stats


class Classifier(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: ``(key, x[B, ...]) -> (params, stats)``.
      infer: ``(params, stats, x) -> logits[B, K]``, in inference mode: nothing is random, no statistics move.
      train: ``(params, stats, x, key) -> (logits, stats)``: batch statistics move, dropout draws from ``key``.
      activations: ``(params, stats, x, key=None) -> (logits, stats, {name: array[B, ...]})``: in inference mode without
        a key, else as ``train``; with what every layer and block gives, by its path, such as ``layer1_0/conv2``, and
        what modules sow by other names. In a compiled program only those that are used are computed.
    """

    init: Callable[[Array, Array], tuple[Params, Stats]]
    infer: Callable[[Params, Stats, Array], Array]
    train: Callable[[Params, Stats, Array, Array], tuple[Array, Stats]]
    activations: Callable[..., tuple[Array, Stats, dict[str, Array]]]

    def logits_fn(self, params: Params, stats: Stats) -> Partial:
        """``x -> logits`` that is itself a pytree: a jitted attack takes new parameters without a new trace."""
        return Partial(self.infer, params, stats)


def from_linen(module: nn.Module) -> Classifier:
    """A `Classifier` of a Linen module.

    Where the module's ``__call__`` has an argument ``train`` or ``training`` it is true in training and false in
    inference; an argument ``deterministic`` is the opposite. All collections but ``params`` are statistics; randomness
    is drawn from the stream ``dropout``. Training raises ValueError for a collection that grows in every call, as what
    modules sow does unless it is sown into ``intermediates``.

    Equal modules get the same functions, for which a compiled attack is not compiled again.

    >>> import jax, jax.numpy as jnp
    >>> net = from_linen(nn.Dense(3))
    >>> params, stats = net.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> net.logits_fn(params, stats)(jnp.ones((2, 4))).shape
    (2, 3)
    """
    return _once(_from_linen, module)


def _from_linen(module: nn.Module) -> Classifier:
    inference, in_training = mode(module, training=False), mode(module, training=True)

    def init(key: Array, x: Array) -> tuple[Params, Stats]:
        variables = dict(module.init(key, x, **inference))
        return variables.pop("params", {}), variables

    def infer(params: Params, stats: Stats, x: Array) -> Array:
        return module.apply({"params": params, **stats}, x, **inference)  # pyright: ignore[reportReturnType]

    def train(params: Params, stats: Stats, x: Array, key: Array) -> tuple[Array, Stats]:
        logits, moved = module.apply(
            {"params": params, **stats}, x, rngs={"dropout": key}, mutable=list(stats), **in_training
        )
        return logits, _as_many(dict(moved), stats)

    def activations(
        params: Params, stats: Stats, x: Array, key: Array | None = None
    ) -> tuple[Array, Stats, dict[str, Array]]:
        training = key is not None
        settings: dict[str, Any] = {"rngs": {"dropout": key}} if training else {}
        moving = list(stats) if training else []
        logits, moved = module.apply(
            {"params": params, **stats}, x, mutable=[*moving, "intermediates"], capture_intermediates=True,
            **settings, **(in_training if training else inference),
        )  # fmt: skip
        captured = _by_path(moved["intermediates"])  # pyright: ignore
        return logits, _as_many({name: moved.get(name, stats[name]) for name in stats}, stats), captured

    return Classifier(init, infer, train, activations)


def _as_many(moved: Stats, stats: Stats) -> Stats:
    """``moved``; were it more than ``stats`` each step would be compiled anew, and no run could be resumed."""
    for name in stats:
        if jax.tree.structure(moved[name]) != jax.tree.structure(stats[name]):
            raise ValueError(
                f"the collection {name!r} has grown in a call, as what modules sow does: sow into 'intermediates', "
                f"which Classifier.activations gives, or take it out of what init gives: stats.pop({name!r})"
            )
    return moved


@lru_cache(maxsize=256)
def _kept(make: Callable[..., Classifier], *arguments: Any) -> Classifier:
    return make(*arguments)


def _once(make: Callable[..., Classifier], *arguments: Any) -> Classifier:
    """What was made before of equal arguments, where these have a hash."""
    try:
        hash(arguments)
    except TypeError:
        return make(*arguments)
    return _kept(make, *arguments)


def _by_path(captured: dict[str, Any]) -> dict[str, Array]:
    """What modules gave, a module that was called several times with the number of the call after its path."""
    named = {}
    for path, values in traverse_util.flatten_dict(captured).items():
        name = "/".join(path[:-1] if path[-1] == "__call__" else path)
        for number, value in enumerate(values):  # pyright: ignore
            named[name + (f"#{number}" if number else "")] = value
    # The whole network's path is empty, and what it gave are the logits.
    return {name: value for name, value in named.items() if name}


def normalized(net: Classifier, mean: Any, std: Any) -> Classifier:
    """The network behind a first layer ``(x - mean) / std``: attacks, threats and data stay in the units of the data.

    Equal arguments get the same functions, as in `from_linen`.

    Args:
      net: what takes normalised images.
      mean, std: scalars or ``[C]``, in the units of the data.

    Raises:
      ValueError: where ``std`` is not positive, or images are not floats or have another number of channels.

    >>> import jax, jax.numpy as jnp
    >>> net = normalized(from_linen(nn.Dense(3, use_bias=False)), mean=0.5, std=0.25)
    >>> params, stats = net.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> print(net.logits_fn(params, stats)(jnp.full((1, 4), 0.5)))
    [[0. 0. 0.]]
    """
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    if not (std > 0).all():
        raise ValueError(f"standard deviations must be above 0, got {std.tolist()}")
    return _once(_normalized, net, *((tuple(values.ravel()), values.shape) for values in (mean, std)))


def _normalized(net: Classifier, *values: tuple[tuple[float, ...], tuple[int, ...]]) -> Classifier:
    mean, std = (np.reshape(*value) for value in values)

    def scaled(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"images must be floats before they are normalised, got {x.dtype}: see data.to_float")
        if any(one.ndim and one.shape != x.shape[-1:] for one in (mean, std)):
            raise ValueError(f"mean and std of {mean.size} and {std.size} channels do not fit images {list(x.shape)}")
        return ((x - mean) / std).astype(x.dtype)

    return Classifier(
        lambda key, x: net.init(key, scaled(x)),
        lambda params, stats, x: net.infer(params, stats, scaled(x)),
        lambda params, stats, x, key: net.train(params, stats, scaled(x), key),
        lambda params, stats, x, key=None: net.activations(params, stats, scaled(x), key),
    )
