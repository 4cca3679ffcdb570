"""What becomes of a token in the cache: plans, methods, codecs, token policies, masks."""
