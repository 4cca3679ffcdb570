"""Which kernel reads a layer, and why not another."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from grace_opt.runtime.kernels.plain import Plain

if TYPE_CHECKING:
    from grace_opt.runtime.kernels.contract import Kernel, Request
    from grace_opt.runtime.layer import PrunedLayer

_PLAIN = Plain()


@cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels that this machine can load, the best first; the plain one reads everything."""
    if find_spec("triton") is None:
        return (_PLAIN,)
    from grace_opt.runtime.kernels.split import TritonKernel

    return TritonKernel(), _PLAIN


def choose(request: Request) -> Kernel:
    """The first kernel that reads the layer and takes the request."""
    return next((kernel for kernel in request.handle.layer.kernels if kernel.takes(request) is True), _PLAIN)


def usable(layer: PrunedLayer) -> list[Kernel]:
    """The kernels that read a layer that has its prompt, the best first."""
    return [kernel for kernel in kernels() if kernel.reads(layer) is True]


def reasons(layer: PrunedLayer) -> dict[str, bool | str]:
    """Kernel -> True, or why it does not read a layer that has its prompt."""
    return {kernel.name: kernel.reads(layer) for kernel in kernels()}
