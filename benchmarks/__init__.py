"""Measurements: one question a file, with the command and what came out in its header."""

import jaxnets as jn

# Before JAX computes anything.
jn.cpu.tune()
