"""Channel graphs: the statistics that make W, the protection of salient channels, and the bundle file."""

from grace_opt.graphs.bundle import GraphBundle, HeadGraph, load_bundle, save_bundle
from grace_opt.graphs.protection import Protection, salient_channels

__all__ = ["GraphBundle", "HeadGraph", "Protection", "load_bundle", "salient_channels", "save_bundle"]
