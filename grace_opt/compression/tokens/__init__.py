"""Which tokens stay in the cache, and in which tier: one policy a file."""
