"""Run an unmodified Hugging Face model on a cache that stores the kept channels only.

    import grace_opt.runtime
    past = grace_opt.runtime.cache("mask/", model)
    model.generate(**inputs, past_key_values=past)

Post-RoPE keys; the first ``sinks`` real tokens of a row and the last ``recent_window`` tokens stay whole, all
others hold the kept channels (docs/cache.md). Tested with transformers 5.2 to 5.23.
"""

from grace_opt.runtime.cache import PrunedCache, cache, cache_nbytes, full_cache_nbytes, online_cache

__all__ = ["PrunedCache", "cache", "cache_nbytes", "full_cache_nbytes", "online_cache"]
