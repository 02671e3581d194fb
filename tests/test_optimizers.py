import jax.numpy as jnp
import numpy as np

from jaxnets.optimizers import triangular


def test_triangular_is_the_published_interpolation():
    """At ``epoch + (i + 1) / n`` of the epochs, the rate interpolates 0, the peak at 2/5, and 0."""
    published = [
        np.interp(epoch + (i + 1) / 600, [0, 4, 10], [0, 5e-3, 0]) for epoch in range(10) for i in range(600)
    ]  # fmt: skip
    ours = triangular(5e-3, 6000)(jnp.arange(6000))
    np.testing.assert_allclose(ours, published, rtol=1e-4, atol=1e-8)
