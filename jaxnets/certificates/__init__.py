"""Certificates: what no attack can break, as a lower bound of robust accuracy beside the upper bound of attacks."""

from jaxnets.certificates import smoothing
from jaxnets.certificates.crown import crown_margins, tightest_margins
from jaxnets.certificates.intervals import interval_bounds, interval_margins
from jaxnets.certificates.rows import Certificate, Margins, box, certified

__all__ = [
    "Certificate", "Margins", "box", "certified", "crown_margins", "interval_bounds", "interval_margins", "smoothing",
    "tightest_margins",
]  # fmt: skip
