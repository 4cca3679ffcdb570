"""LongBench (Bai et al., arXiv 2308.14508): `family` makes prompts, `wording` is how tasks ask, `metrics` score."""
