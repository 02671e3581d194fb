"""Experiments: one claim a file, with the command, the hardware and what came out in its header."""
