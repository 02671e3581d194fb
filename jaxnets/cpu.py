"""What makes networks on CPUs fastest: settings of XLA, and convolutions by the oneDNN that jaxlib carries."""

import json
import os
import platform
from typing import Any

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"

_ONEDNN = "__onednn$convolution"

_KNOWN = "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1"
"""Of jaxlib, whose oneDNN was seen to take a convolution as it is described here."""

_registered = False


def tune() -> None:
    """Makes convolutional networks on CPUs faster, in this process; call it before JAX computes anything.

    Convolutions go to oneDNN where that is known to work: of single precision, in jaxlib 0.10.2 to 0.12.0.1 for Linux
    on x86-64, in programs for one device, which cannot be kept on disk. With several devices, or JAX's persistent
    compilation cache in use, they are XLA's own. XLA of jax 0.10 gives those, products and sums to YNNPACK, whose
    convolutions are slow: a flag, which processes that this one starts inherit, leaves it the rest. Networks are about
    twice as fast with jax 0.10, 1.2 to 1.4 times with later versions.

    Elsewhere and with other versions nothing changes; nor do the flags where ``XLA_FLAGS`` names this one. The command
    ``jaxnets`` calls it.

    >>> tune()
    """
    # Here, for the command answers a request for help before it needs this.
    import importlib.metadata

    version = importlib.metadata.version("jaxlib")
    flags = os.environ.get("XLA_FLAGS", "")
    # A version that does not know the flag would end the process.
    if _FLAG not in flags and version.startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=individual_dot,reduce".strip()
    # So would one that expects another description of a convolution.
    if version in _KNOWN and platform.system() == "Linux" and platform.machine() == "x86_64":
        _register()


def by_onednn(dtype: Any) -> bool:
    """Whether arrays of this type are convolved by oneDNN in what is compiled now."""
    import jax

    kept = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir  # pyright: ignore
    return _registered and dtype == "float32" and jax.device_count() == 1 and not kept


def _register() -> None:
    global _registered
    if _registered:
        return
    import jax
    from jax.extend.core.primitives import conv_general_dilated_p
    from jax.interpreters import mlir

    xla = mlir._platform_specific_lowerings["cpu"][conv_general_dilated_p].rule

    def convolution(ctx, lhs, rhs, **settings):
        arrays = *ctx.avals_in, *ctx.avals_out
        if not (all(by_onednn(array.dtype) for array in arrays) and _suits(ctx.module_context, arrays, **settings)):
            return xla(ctx, lhs, rhs, **settings)
        described = json.dumps({"onednn_conv_config": _described(ctx.avals_in[1].shape, **settings)})
        return jax.ffi.ffi_lowering(_ONEDNN, api_version=2, backend_config=described)(ctx, lhs, rhs)

    mlir.register_lowering(conv_general_dilated_p, convolution, platform="cpu")
    _registered = True


def _suits(
    module: Any,
    arrays: Any,
    *,
    padding: Any,
    lhs_dilation: Any,
    dimension_numbers: Any,
    batch_group_count: int,
    **_: Any,
) -> bool:
    """Whether oneDNN has a fast kernel for this: some images or volumes, channels last, whole on one device."""
    return (
        getattr(module.axis_context, "num_devices", None) == 1
        and not module.lowering_parameters.for_export
        and all(array.ndim in (4, 5) and array.size for array in arrays)
        and dimension_numbers.lhs_spec == dimension_numbers.out_spec == _channels_last(arrays[0].ndim)
        and batch_group_count == 1
        and all(step == 1 for step in lhs_dilation)
        and all(size >= 0 for sizes in padding for size in sizes)
    )


def _channels_last(dims: int) -> tuple[int, ...]:
    return 0, dims - 1, *range(1, dims - 1)


def _described(
    kernel: tuple[int, ...],
    *,
    window_strides: Any,
    padding: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    **_: Any,
) -> dict[str, Any]:
    """The convolution as XLA tells oneDNN of it."""
    images, (outputs, inputs, *window), _ = dimension_numbers
    data = {"data": {"batch_dim": images[0], "feature_dim": images[1], "spatial_dims": images[2:]}}
    filters = {"output_feature_dim": outputs, "input_feature_dim": inputs, "spatial_dims": window}
    before, after = zip(*padding, strict=True)
    return {
        "dims": len(kernel),
        "input": data,
        "kernel": {"filter": filters},
        "output": data,
        "window": {
            "size": [kernel[axis] for axis in window],
            "pad_left": before,
            "pad_right": after,
            "strides": window_strides,
            "window_dilations": rhs_dilation,
        },
        "feature_groups": feature_group_count,
    }
