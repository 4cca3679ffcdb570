"""The solvers of grace-opt, one a file. They know grace_opt.problem and grace_opt.solution, and nothing else of it."""
