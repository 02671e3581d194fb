"""``jaxnets verify``: checks saved adversarial examples without any attack in the process."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.cli import Verify
from jaxnets.commands.run import load
from jaxnets.verification import Examples, InvalidExample, accuracy_interval, check_examples, load_examples


def verify(command: Verify) -> None:
    """Range, ball, the clean rows and the accuracies of a file; anything wrong raises `InvalidExample`."""
    examples = load_examples(command.file)
    folder = command.run or _run_of(command.file, examples.origin)
    # An example may be of the best weights or of the last; other programs that write files do not say.
    config = examples.origin.get("config")
    last = isinstance(config, dict) and bool(config.get("last"))
    run, model = load(folder, examples=len(examples.x), data_dir=command.data_dir, last=last)
    if not (np.array_equal(run.x, examples.x) and np.array_equal(run.y, examples.y)):
        raise InvalidExample(f"{command.file}: its clean rows are not the first test rows of the data of {folder}")
    classify = jax.jit(lambda x: jnp.argmax(model(x), axis=-1))
    predict = lambda x: np.concatenate([classify(rows) for rows in np.array_split(x, -(-len(x) // 500))])  # noqa: E731
    survivors = check_examples(examples, predict)
    print(f"{command.file}: {len(examples.x)} rows, all finite, inside the box and inside {examples.threat}")
    for name, rows in survivors.items():
        low, high = accuracy_interval(int(rows.sum()), len(rows))
        print(f"{name:20} {rows.mean():8.2%}   {100 * low:.2f} - {100 * high:.2f}   {rows.sum()}/{len(rows)}")
    _compare(examples, survivors)
    print("every accuracy is the one said in the file")


def _run_of(file: Path, origin: dict[str, Any]) -> Path:
    named = origin.get("run")
    if not isinstance(named, str):
        raise ValueError(f"{file} must name the run that it is of, got {named!r}: say --run")
    return Path(named)


def _compare(examples: Examples, survivors: dict[str, np.ndarray]) -> None:
    for name, rows in survivors.items():
        wrong = np.flatnonzero(examples.survived[name] != rows)
        if len(wrong):
            raise InvalidExample(
                f"attack {name!r}: {len(wrong)} of {len(rows)} rows are classified otherwise than the file says, "
                f"row {wrong[0]} first: it was made for other weights, or altered"
            )
    _check_stages(examples, survivors)


def _check_stages(examples: Examples, survivors: dict[str, np.ndarray]) -> None:
    """Those of a cascade, without examples of their own: rows can but fall, and the last stage leaves what it does."""
    left = examples.survived.keys() - survivors.keys()
    for name, whole in survivors.items():
        stages = [stage for stage in examples.survived if stage in left and stage.startswith(f"{name}: ")]
        before = survivors["clean"]
        for stage in stages:
            if (examples.survived[stage] & ~before).any():
                raise InvalidExample(f"attack {stage!r}: rows survive it that had fallen before: it was altered")
            before = examples.survived[stage]
        left -= set(stages)
        if stages and not np.array_equal(before, whole):
            raise InvalidExample(f"attack {name!r}: other rows survive it than its last stage: it was altered")
    if left:
        raise InvalidExample(f"attack {min(left)!r}: the file has no examples of it: it was altered")
