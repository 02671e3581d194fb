"""Weights of twins that `jaxnets.weights` does not read, laid out as our networks have them: ``state_dict -> params``.

They only move numbers, so that gradients go the same way. ``image`` is the shape of one, ``(H, W, C)``.
"""

import numpy as np

from tests import torch_networks as twins


def _arrays(state):
    return {name: np.asarray(value) for name, value in state.items()}


def _normalization(state, name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def _dense(state, name):
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def _convolution(state, name):
    return {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": state[f"{name}.bias"]}


def rbf_network(state, image):
    state, (height, width, channels) = _arrays(state), image
    centers = state["centers"].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return {
        "RadialBasis_0": {"centers": centers.reshape(len(centers), -1), "log_width": state["log_width"]},
        "Dense_0": _dense(state, "linear"),
    }


def lenet5(state, image):
    state = _arrays(state)
    c3, c5 = _convolution(state, "c3"), _convolution(state, "c5")
    seen = [[s2 for s2, row in enumerate(twins.C3_TABLE) if row[number] == "X"] for number in range(16)]
    kernels = {f"kernel_{number}": c3["kernel"][:, :, maps, number, None] for number, maps in enumerate(seen)}
    return {
        "Conv_0": _convolution(state, "c1"),
        "Subsampling_0": _subsampling(state, "s2"),
        "SparseC3_0": {**kernels, "bias": c3["bias"]},
        "Subsampling_1": _subsampling(state, "s4"),
        "Dense_0": {"kernel": c5["kernel"].reshape(-1, 120), "bias": c5["bias"]},
        "Dense_1": _dense(state, "f6"),
    }


def _subsampling(state, name):
    return {"scale": state[f"{name}.weight"].ravel(), "bias": state[f"{name}.bias"].ravel()}


def vit(state, image, heads):
    state = _arrays(state)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {
        "patches": _convolution(state, "patches"),
        "class_token": state["token"],
        "positions": state["positions"],
        **{f"block{number}": _encoder_block(state, f"blocks.{number}", heads) for number in range(depth)},
        "norm": _normalization(state, "norm"),
        "head": _dense(state, "head"),
    }


def _encoder_block(state, name, heads):
    return {
        "norm1": _normalization(state, f"{name}.norm1"),
        "attention": _attention(state, f"{name}.self_attn", heads),
        "norm2": _normalization(state, f"{name}.norm2"),
        "fc1": _dense(state, f"{name}.linear1"),
        "fc2": _dense(state, f"{name}.linear2"),
    }


def _attention(state, name, heads):
    """PyTorch has queries, keys and values in one matrix, and each head's share as neighbours."""
    kernels = np.split(state[f"{name}.in_proj_weight"], 3)
    biases = np.split(state[f"{name}.in_proj_bias"], 3)
    width = len(biases[0])
    inputs = {
        part: {"kernel": kernel.T.reshape(width, heads, -1), "bias": bias.reshape(heads, -1)}
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    out = _dense(state, f"{name}.out_proj")
    return {**inputs, "out": {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]}}
