"""How each side does the work: a file a side, each with ``make(work, loaded)``, which gives a call that does it once.

The call of an attack returns adversarial rows as ``[N, H, W, C]``; that of training nothing. `NotOfferedError` where a
side has no such method.
"""

from typing import Any

import numpy as np

from benchmarks.work import Precision

SIDES = (
    "jaxnets", "by_hand", "by_hand_compiled", "torchattacks", "foolbox_jax", "foolbox_torch", "art", "cleverhans",
    "official",
)  # fmt: skip


ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
"""Norms as numbers, and below as the papers write them: how peers are told."""
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class NotOfferedError(LookupError):
    """A side has no such method."""


def torch_device() -> str:
    """Where PyTorch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(net: Any, precision: Precision) -> Any:
    """The network where PyTorch computes; its process multiplies in ``precision`` from then on."""
    import torch

    class InBfloat16(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.autocast(x.device.type, torch.bfloat16):
                return self.net(x).float()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.benchmark = True
    net = net.to(torch_device())
    return InBfloat16().train(net.training) if precision == "bf16" else net


def to_torch(x: np.ndarray, y: np.ndarray) -> Any:
    """Rows and classes for PyTorch: ``[N, C, H, W]``, whose memory stays channels-last."""
    import torch

    rows, classes = torch.tensor(x), torch.tensor(np.asarray(y, np.int64))
    return rows.to(torch_device()).permute(0, 3, 1, 2), classes.to(torch_device())


def from_torch(x_adv: Any) -> np.ndarray:
    """``[N, H, W, C]``."""
    return x_adv.detach().permute(0, 2, 3, 1).cpu().numpy()


def wait_for_torch() -> None:
    """Until what was asked of a GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def frozen(twin: Any) -> Any:
    """The network as a careful user attacks it: channels-last, without gradients of its parameters."""
    import torch

    return twin().to(memory_format=torch.channels_last).eval().requires_grad_(False)
