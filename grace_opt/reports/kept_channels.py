"""Pictures."""

from __future__ import annotations

from pathlib import Path

from grace_opt.compression.mask import KVMask
from grace_opt.files import replacing


def kept_channels(mask: KVMask, path: str | Path, title: str) -> None:
    """A PNG with a row for each layer and KV head and a column for each key channel; kept ones are dark."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # without pyplot: no window, no global state, and nothing to close
    from matplotlib.patches import Patch

    matrix = mask.keep_matrix("key")
    layers, heads, channels = matrix.shape
    kept, pruned = "#1f4e79", "#dfe6ee"
    figure = Figure(figsize=(8, max(3.0, 0.085 * layers * heads + 1.5)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        matrix.reshape(-1, channels),
        cmap=ListedColormap([pruned, kept]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=0.8)
    step = max(1, layers // 15)
    shown = range(0, layers, step)
    axes.set_yticks([layer * heads + (heads - 1) / 2 for layer in shown], [str(layer) for layer in shown])
    axes.set_xticks(range(0, channels, 8))
    axes.set_xlabel("key channel (post-RoPE)")
    axes.set_ylabel(f"layer ({heads} KV heads each)" if heads > 1 else "layer")
    axes.set_title(title)
    axes.legend(
        handles=[Patch(color=kept, label="kept"), Patch(color=pruned, label="pruned")],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
