"""The conformance kit of solvers."""
