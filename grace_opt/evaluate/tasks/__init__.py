"""Tasks: one module a family."""
