"""``jaxnets summary``: the layers of a network."""

from jaxnets import models
from jaxnets.cli import Summary
from jaxnets.commands.networks import MODELS, module
from jaxnets.commands.settings import check_at_least


def summary(command: Summary) -> None:
    """Prints the layers of a network with their shapes, parameters and operations."""
    named = MODELS[command.model]
    image = named.image if command.image is None else command.image
    classes = named.classes if command.classes is None else command.classes
    check_at_least(command, depth=1)
    if min(*image, classes) < 1:
        raise ValueError(f"--image and --classes must be 1 or more, got {image} and {classes}")
    print(models.summary(module(command.model, classes, image), image, command.depth))
