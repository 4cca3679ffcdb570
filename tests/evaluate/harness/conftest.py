"""What needs lm-eval is run by .ci/lm-eval, in an environment that has it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["in_lm_eval"]
