"""Solvers against each other on the heads of graph bundles."""
