"""Attention over a compressed cache: a contract, a chooser, and the kernels behind it."""
