"""Adversarial examples checked by code that made none: in numpy, in double precision, without any attack.

A file of examples can be checked long after, by someone who trusts nothing but this module and the model.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from jaxnets.threats import L0, L1, L2, Linf, Masked, Threat

_NORMS: dict[type, Callable[[np.ndarray], np.ndarray]] = {
    Linf: lambda delta: np.abs(delta).max(axis=1, initial=0.0),
    L2: lambda delta: np.sqrt((delta**2).sum(axis=1)),
    L1: lambda delta: np.abs(delta).sum(axis=1),
    L0: lambda delta: (delta != 0).sum(axis=1).astype(float),
    Masked: lambda delta: np.abs(delta).max(axis=1, initial=0.0),
}


class InvalidExample(ValueError):  # noqa: N818 - it is the example that is invalid
    """An attack returned something that the threat does not allow."""


def norms(threat: Threat, x_adv: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The size of every row's perturbation in the threat's norm, float64 ``[N]``; infinite where it leaves a mask."""
    delta = np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)
    if isinstance(threat, Masked):
        delta = np.where(threat.mask.values | (delta == 0), delta, np.inf)
    return _NORMS[type(threat)](_flat(delta))


def verify(name: str, x_adv: np.ndarray, x: np.ndarray, threat: Threat) -> None:
    """Raises `InvalidExample` unless every row is finite, inside the box and inside the ball.

    The tolerance for single-precision rounding is ``1e-6`` times the largest of 1, epsilon and the box's ends, where
    those are finite. An infinite epsilon allows every size.
    """
    size, epsilon = norms(threat, x_adv, x), float(threat.epsilon)
    x_adv = np.asarray(x_adv, np.float64)
    outside = _flat(np.maximum(x_adv - threat.upper, threat.lower - x_adv)).max(axis=1, initial=-np.inf)
    width = 1e-6 * max([1.0, *(abs(end) for end in (threat.lower, threat.upper) if math.isfinite(end))])
    room = epsilon + max(width, 1e-6 * epsilon)
    largest = np.max(size, initial=0.0)
    for bad, what in [
        (~_flat(np.isfinite(x_adv)).all(axis=1), "is not finite"),
        (outside > width, f"leaves the box [{threat.lower}, {threat.upper}]"),
        (~(size <= room), f"leaves the ball: the largest perturbation is {largest:.8g} in {threat}"),
    ]:
        if bad.any():
            rows = np.flatnonzero(bad)
            raise InvalidExample(
                f"attack {name!r}: {len(rows)} of {len(x)} examples are not allowed: row {rows[0]} {what}. "
                "Nothing is reported; mend the attack"
            )


def _flat(rows: np.ndarray) -> np.ndarray:
    """``[N, ...]`` as ``[N, D]``, for no rows too."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def accuracy_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a proportion: at least ``level`` of such intervals hold the true one.

    >>> low, high = accuracy_interval(0, 10)
    >>> print(round(low, 4), round(high, 4))
    0.0 0.3085
    """
    tail = (1 - level) / 2
    low = scipy_stats.beta.ppf(tail, correct, total - correct + 1) if correct else 0.0
    high = scipy_stats.beta.ppf(1 - tail, correct + 1, total - correct) if correct < total else 1.0
    return float(low), float(high)


class Examples(NamedTuple):
    """What a file of adversarial examples holds.

    Attributes:
      x: clean rows ``[N, ...]``.
      y: their classes ``[N]``.
      x_adv: by attack, adversarial rows ``[N, ...]``; rows that no attack was needed for are the clean ones.
      survived: by attack, ``clean`` first, which rows were said to be classified correctly ``[N]``.
      threat: what the attacks were allowed.
      origin: where they came from: seed, configuration, versions.
    """

    x: np.ndarray
    y: np.ndarray
    x_adv: dict[str, np.ndarray]
    survived: dict[str, np.ndarray]
    threat: Threat
    origin: dict[str, Any]


_THREATS = {threat.__name__: threat for threat in _NORMS}


def save_examples(path: Path, examples: Examples) -> None:
    """Writes an ``.npz`` of arrays and JSON: nothing in it is ever unpickled. Whole or not at all."""
    threat = examples.threat
    static = {name: value for name, value in vars(threat).items() if name not in ("epsilon", "mask")}
    about = {"threat": type(threat).__name__, "epsilon": float(threat.epsilon), **static, "origin": examples.origin}
    arrays = {f"x_adv/{name}": rows for name, rows in examples.x_adv.items()}
    arrays |= {f"survived/{name}": rows for name, rows in examples.survived.items()}
    if isinstance(threat, Masked):
        arrays["mask"] = threat.mask.values
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, x=examples.x, y=examples.y, about=json.dumps(about), **arrays)
    draft.replace(path)


def load_examples(path: Path) -> Examples:
    """Reads what `save_examples` wrote.

    Raises:
      ValueError: where the file is not such a file, or is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays["about"]))
        kind = _THREATS[about.pop("threat")]
        origin = about.pop("origin")
        _check_about(about, origin)
        _check_shapes(arrays)
        mask = [arrays["mask"]] if kind is Masked else []
        x_adv, survived = _named(arrays, "x_adv/"), _named(arrays, "survived/")
        return Examples(arrays["x"], arrays["y"], x_adv, survived, kind(*mask, **about), origin)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, numpy and json raise many kinds for damaged files
        # Its first sentence: numpy goes on to say how one may trust such a file.
        why = str(error).partition(". ")[0]
        raise ValueError(f"{path} is no file of adversarial examples, or is damaged ({why}): write it again") from error


def _check_about(threat: dict[str, Any], origin: Any) -> None:
    for name, value in threat.items():
        if not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not isinstance(origin, dict):
        raise ValueError(f"origin must be a dict, got {origin!r}")


def _check_shapes(arrays: dict[str, np.ndarray]) -> None:
    rows = arrays["x"].shape
    if not (rows and rows[0]):
        raise ValueError(f"x must hold at least one row, got shape {rows}")
    attacks = list(_named(arrays, "x_adv/"))
    wanted = {f"survived/{name}": rows[:1] for name in ("clean", *attacks)}
    wanted |= {"x": rows, "y": rows[:1], **{f"x_adv/{name}": rows for name in attacks}}
    for name, shape in wanted.items():
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        found = arrays[name]
        kinds = "b" if name.startswith("survived/") else "iu" if name == "y" else "iuf"
        if found.shape != shape or found.dtype.kind not in kinds:
            raise ValueError(f"{name} does not fit x of shape {rows}: it is {found.dtype} of shape {found.shape}")


def _named(arrays: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(start): rows for name, rows in arrays.items() if name.startswith(start)}


def check_examples(examples: Examples, predict: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """Checks every attack's rows against the threat, and classifies them anew: survivors by attack, bool ``[N]``.

    Args:
      examples: from `load_examples`.
      predict: rows ``[N, ...]`` to classes ``[N]``.

    Raises:
      InvalidExample: as `verify` does, for ``x`` itself too; and where shapes do not fit.
    """
    clean = replace(examples.threat, epsilon=0.0)  # pyright: ignore
    verify("clean", examples.x, examples.x, clean)
    right = predict(examples.x) == examples.y
    survivors = {"clean": right}
    for name, rows in examples.x_adv.items():
        if rows.shape != examples.x.shape:
            raise InvalidExample(f"attack {name!r}: {rows.shape} examples for {examples.x.shape} rows")
        verify(name, rows, examples.x, examples.threat)
        survivors[name] = right & (predict(rows) == examples.y)
    return survivors
