"""How each side does the work: a file a side, each with ``make(work, loaded)``, which gives a call that does it once.

The call of an attack returns adversarial rows as ``[N, H, W, C]``; that of training nothing. `NotOfferedError` where a
side has no such method.
"""

from typing import Any

import numpy as np

SIDES = (
    "jaxnets", "by_hand", "by_hand_compiled", "torchattacks", "foolbox_jax", "foolbox_torch", "art", "cleverhans",
    "official",
)  # fmt: skip


ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
"""Norms as numbers, and below as the papers write them: how peers are told."""
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class NotOfferedError(LookupError):
    """A side has no such method."""


def to_torch(x: np.ndarray, y: np.ndarray) -> Any:
    """Rows and classes for PyTorch: ``[N, C, H, W]``, whose memory stays channels-last."""
    import torch

    return torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(np.asarray(y, np.int64))


def from_torch(x_adv: Any) -> np.ndarray:
    """``[N, H, W, C]``."""
    return x_adv.detach().permute(0, 2, 3, 1).numpy()


def frozen(twin: Any) -> Any:
    """The network as a careful user attacks it: channels-last, without gradients of its parameters."""
    import torch

    return twin().to(memory_format=torch.channels_last).eval().requires_grad_(False)
