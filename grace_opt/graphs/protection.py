"""Salient-channel protection (GRACE, arXiv 2604.16983, section III-C)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from grace_opt.errors import InputError
from grace_opt.problem import BoolArray, FloatArray


@dataclass(frozen=True)
class Protection:
    """Keep channels whose key norm is far above the head's others.

    A channel is salient if its L2 norm over the keys exceeds mean + ``multiple`` * standard deviation of the
    head's channel norms. The fraction of salient channels is clamped to [``at_least``, ``at_most``]; that
    fraction of the channels, those of largest norm, is protected. The paper fixes the multiple at 1 and names
    the two bounds a and b without giving them; 5 % and 20 % are ours.
    """

    multiple: float = 1.0
    at_least: float = 0.05
    at_most: float = 0.20

    def __post_init__(self) -> None:
        if not 0 <= self.at_least <= self.at_most <= 1:
            raise InputError(
                f"protection bounds must satisfy 0 <= a <= b <= 1, got a = {self.at_least}, b = {self.at_most}"
            )
        if not math.isfinite(self.multiple):
            raise InputError(f"the protection multiple must be a finite number, got {self.multiple}")


def salient_channels(key_norms: FloatArray, protection: Protection) -> BoolArray:
    """Which channels to protect: bool[n] from the L2 norm of each key channel, float64[n].

    The number protected is floor(fraction * n) of the clamped fraction; ties go to the lowest channel.
    The standard deviation is that of the whole population (divided by n). O(n log n).
    """
    norms = np.asarray(key_norms, np.float64)
    qualify = float(np.mean(norms > norms.mean() + protection.multiple * norms.std()))
    fraction = min(max(qualify, protection.at_least), protection.at_most)
    count = math.floor(fraction * len(norms) + 1e-9)  # 0.05 * 60 is 2.9999999999999996 in floating point
    salient = np.zeros(len(norms), bool)
    salient[np.argsort(-norms, kind="stable")[:count]] = True
    return salient
