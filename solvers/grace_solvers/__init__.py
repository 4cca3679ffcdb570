"""The solvers of grace-opt, one a file. Of it they know `problem`, `solution` and `greedy`, and nothing else."""
