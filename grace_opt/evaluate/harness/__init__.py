"""lm-evaluation-harness on compressed caches: ``lm_eval --model grace_opt`` (docs/lm-eval.md).

`arguments` and `contexts` do without lm-eval; `model` imports it.
"""
