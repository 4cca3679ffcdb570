"""Every compiled part is loaded, or compiled, before a solver's clock starts."""

from __future__ import annotations

import logging
import threading

import numpy as np

from grace_opt.problem import SubsetProblem
from grace_solvers.parts.dual import root
from grace_solvers.parts.exchange import iterated_tabu, starts
from grace_solvers.parts.tree import branch, new_pool, push
from grace_solvers.parts.undecided import core_of

_MESSAGE = "compiling the solvers for this machine; it takes up to half a minute, once"
_lock = threading.Lock()
_done = threading.Event()


def ready() -> None:
    """Use each kernel once on a small problem; says so on the logger ``grace_opt`` when that takes over three seconds.

    From the second call in a process on it costs nothing.
    """
    with _lock:
        if _done.is_set():
            return
        word = threading.Timer(3.0, logging.getLogger("grace_opt").warning, (_MESSAGE,))
        word.daemon = True
        word.start()
        try:
            _use()
        finally:
            word.cancel()
        _done.set()


def _use() -> None:
    signs = np.sign(np.random.default_rng(0).standard_normal((8, 8)))
    for groups in (None, np.array([0, 0, 1, 1, -1, -1, -1, -1])):
        core = core_of(SubsetProblem(signs + signs.T, 4, groups=groups))
        iterated_tabu(core, starts(core), rounds=1)
        top = root(core, core.weights.sum() + 100.0)  # so that nothing is decided
        pool = new_pool(64, top.core.k, 1e3, 1e3)
        push(pool, np.full(top.core.k, -1, np.int8), top.x, top.lower_bound, top.lower_bound)
        core = top.core
        branch(core.weights, top.Q, top.linear, core.constant, core.sizes, core.count, pool, 64, 0.0, 0.0, False, 0)
