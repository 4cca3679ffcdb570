"""What a policy costs in quality: divergence from the uncompressed run, needle retrieval, bytes, statistics."""
