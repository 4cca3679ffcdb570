"""Models: loading them, their configuration, watching their attention, texts for them."""
