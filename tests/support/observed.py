"""Layers of random queries, keys and values, as attention would have seen them."""

from __future__ import annotations

import torch

from grace_opt.graphs.observed import InputProjections, Observed
from grace_opt.models.rotary import Turn

LAYERS = {"heads": 2, "group": 3, "window": 5, "tokens": 70, "n": 16, "nv": 12, "hidden": 20}


def projections() -> torch.nn.Module:
    """The projections of an attention module."""
    module = torch.nn.Module()
    module.k_proj = torch.nn.Linear(LAYERS["hidden"], LAYERS["heads"] * LAYERS["n"])
    module.v_proj = torch.nn.Linear(LAYERS["hidden"], LAYERS["heads"] * LAYERS["nv"], bias=False)
    return module


class Still:
    """The rotary embedding of a model without one."""

    def layers(self) -> dict[int, None]:
        return {}


def observed_layers(seed: int, count: int = 3) -> dict[int, Observed]:
    """``count`` layers of the sizes above; channels differ in size, and layers in how peaked their attention is."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    at = LAYERS
    return {
        i: Observed(
            normal(at["heads"] * at["group"], at["window"], at["n"]) * (1 + i) * normal(at["n"]).exp(),
            normal(at["heads"], at["tokens"], at["n"]) @ (torch.eye(at["n"]) + 0.3 * normal(at["n"], at["n"])),
            normal(at["heads"], at["tokens"], at["nv"]),
            0.25,
            2,
            3,
            normal(at["hidden"], at["heads"] * at["group"] * at["nv"]),
            turn=Turn(Still(), i),  # type: ignore[arg-type]
            inputs=InputProjections(projections(), normal(at["hidden"]).abs()),
        )
        for i in range(count)
    }
