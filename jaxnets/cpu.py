"""Settings of XLA under which a CPU trains and attacks fastest."""

import os

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def tune() -> None:
    """Makes convolutional networks on CPUs 1.3 to 1.6 times as fast, in this process and those that it starts.

    XLA of jax 0.10 gives convolutions, products and sums to YNNPACK. Its own convolutions are faster: they are taken
    here, and YNNPACK for the rest. On other devices and with other versions nothing changes, nor where ``XLA_FLAGS``
    has a say in this already. Call it before JAX computes anything; the command ``jaxnets`` does.

    >>> tune()
    """
    # Here, for the command answers a request for help before it needs this.
    import importlib.metadata

    flags = os.environ.get("XLA_FLAGS", "")
    # A version that does not know the flag would end the process.
    if _FLAG not in flags and importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=individual_dot,reduce".strip()
