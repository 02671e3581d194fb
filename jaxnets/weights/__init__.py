"""Weights from outside, and our own for others: PyTorch's ``state_dict`` read, folders of safetensors written and read.

Nothing here unpickles what is not a tensor.
"""

from jaxnets.weights.folders import Published, fetch, load, save
from jaxnets.weights.pytorch import by_name, by_order, from_torch

__all__ = ["Published", "by_name", "by_order", "fetch", "from_torch", "load", "save"]
