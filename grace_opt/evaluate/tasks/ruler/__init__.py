"""RULER (Hsieh et al., arXiv 2404.06654): `family` names the tasks and scores them, the other modules make them."""
