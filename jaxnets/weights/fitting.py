"""Whether the weights that are there are those that are wanted."""

from collections.abc import Mapping

Shape = tuple[int, ...]


def check_fit(wanted: Mapping[str, Shape], there: Mapping[str, Shape], source: str) -> None:
    """Compares names and shapes.

    Raises:
      ValueError: where any differ, with all of them.

    >>> check_fit({"a": (2,), "b": (3,)}, {"a": (1,), "c": (3,)}, "this file")
    Traceback (most recent call last):
      ...
    ValueError: this file does not fit the network:
      missing: b
      left over: c
      other shapes: a is (1,), the network takes (2,)
    Build the network as it was when it was saved (classes, width, heads), or leave out what is left over
    """
    differ = [name for name in wanted if name in there and wanted[name] != there[name]]
    problems = {
        "missing": [name for name in wanted if name not in there],
        "left over": [name for name in there if name not in wanted],
        "other shapes": [f"{name} is {there[name]}, the network takes {wanted[name]}" for name in differ],
    }
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(
            "\n".join([f"{source} does not fit the network:", *lines])
            + "\nBuild the network as it was when it was saved (classes, width, heads), or leave out what is left over"
        )
