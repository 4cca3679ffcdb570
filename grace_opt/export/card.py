"""The model card of an export: what it is, how to use it, and what was measured."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from grace_opt.files import json_text
from grace_opt.versions import distribution_version

if TYPE_CHECKING:
    from grace_opt.export.target import Record, Source


def card(source: Source, measured: Record, *, what: str, use: str, tags: list[str]) -> str:
    """Markdown with the front matter that model hubs read. ``what``: a paragraph; ``use``: Python that runs it."""
    kl, rise = measured["kl"], measured["nll"]
    share = measured["bytes_per_token"] / measured["full_bytes_per_token"]
    windows = source.mask.windows
    spread = "" if kl["low"] is None else f" (95 % interval {kl['low']:.4f} to {kl['high']:.4f})"
    return f"""\
---
base_model: {json_text(source.name)}
library_name: transformers
tags: {json_text(["grace-opt", "kv-cache", *tags])}
---

# {source.name} with a compressed key/value cache

{what}

```python
{use.strip()}
```

The first {windows.sinks} tokens and the last {windows.recent_window} stay whole; older ones are held as `kv_mask.json`
says ({_held(source)}). Generated tokens: `{windows.generated}`. Read-outs: `{source.mask.readout_scope}`.

## Measured

On {measured["documents"]} texts, prompts of {measured["length"]} tokens and the {measured["scored"]} tokens after each,
beside the uncompressed model ({source.model.dtype}, grace-opt {importlib.metadata.version("grace-opt")}, torch
{distribution_version("torch")}, transformers {distribution_version("transformers")}):

| | |
|---|---|
| KL to the uncompressed model, nats a token | {kl["mean"]:.4f}{spread} |
| rise of the negative log-likelihood, nats a token | {rise["mean"]:.4f} |
| same likeliest token | {measured["top1"]:.1%} |
| bytes of keys and values a token of such a prompt | {measured["bytes_per_token"]:.0f} of \
{measured["full_bytes_per_token"]:.0f} ({share:.1%}) |

`grace_opt_export.json` has these figures, the versions, and a sha256 for each file.
"""


def _held(source: Source) -> str:
    """Codecs of the first layer, in words."""
    layer = next(iter(source.mask.plan), None)
    if layer is None or not layer.codecs:
        return "as each prompt asks"
    parts = []
    for kind, codecs in layer.codecs.items():
        bits = getattr(codecs[0], "bits", None)
        name = getattr(codecs[0], "inner", codecs[0]).name
        parts.append(f"{kind}s as {name}" + (f" in {bits} bits" if bits else ""))
    return ", ".join(parts)
