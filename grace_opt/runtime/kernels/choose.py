"""Which kernel reads a layer, and why not another."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from grace_opt.errors import InputError, did_you_mean
from grace_opt.runtime.kernels.cpu import CpuKernel
from grace_opt.runtime.kernels.plain import Plain

if TYPE_CHECKING:
    from grace_opt.runtime.kernels.contract import Kernel, Request
    from grace_opt.runtime.layer import PrunedLayer

_PLAIN = Plain()


@cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels that this machine can load, the best first; the plain one reads everything."""
    if find_spec("triton") is None:
        return CpuKernel(), _PLAIN
    from grace_opt.runtime.kernels.split import TritonKernel

    return TritonKernel(), CpuKernel(), _PLAIN


def choose(request: Request) -> Kernel:
    """The first kernel that reads the layer and takes the request."""
    return next((kernel for kernel in request.handle.layer.kernels if kernel.takes(request) is True), _PLAIN)


def usable(layer: PrunedLayer) -> list[Kernel]:
    """The kernels that read a layer that has its prompt, the best first; only the one it was told to use, if any.

    Raises InputError if that one cannot.
    """
    if layer.kernel is None:
        return [kernel for kernel in kernels() if kernel.reads(layer) is True]
    kernel = next(each for each in kernels() if each.name == layer.kernel)
    if (answer := kernel.reads(layer)) is not True:
        raise InputError(
            f"kernel {kernel.name!r} cannot read layer {layer.index}: {answer}; leave out kernel, or use {_PLAIN.name}"
        )
    return [kernel]


def check_name(kernel: str | None) -> None:
    """Raise `InputError` for the name of a kernel that this machine cannot load."""
    names = [each.name for each in kernels()]
    if kernel is not None and kernel not in names:
        raise InputError(f"unknown kernel {kernel!r}{did_you_mean(kernel, names)}; this machine has {', '.join(names)}")


def reasons(layer: PrunedLayer) -> dict[str, bool | str]:
    """Kernel -> True, or why it does not read a layer that has its prompt."""
    return {kernel.name: kernel.reads(layer) for kernel in kernels()}
