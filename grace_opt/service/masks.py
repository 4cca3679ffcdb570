"""The masks of a complete run, made of its records."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError
from grace_opt.graphs import GraphBundle
from grace_opt.records import budget_name, budget_of
from grace_opt.service.db.blobs import BlobStore
from grace_opt.service.db.database import Row
from grace_opt.service.db.outages import is_outage
from grace_opt.service.plan import method_of, windows_of
from grace_opt.solution import Solution

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask

log = logging.getLogger("grace_opt.service")


def masks_of(records: Sequence[Row], bundle: GraphBundle, request: Mapping[str, Any], blobs: BlobStore) -> list[Row]:
    """A mask for each budget and solver that has a selection for every head, written to the blobs.

    Raises OSError, or an InputError that comes from one, if a mask cannot be written (a full disk).
    """
    from grace_opt.compression.from_bundle import mask_from_solutions

    scope, windows, method = request["config"]["readout"], windows_of(request), method_of(request)
    selections: dict[tuple[str, str], dict[str, Row]] = {}
    for record in records:
        selections.setdefault((budget_name(record), record["solver"]), {})[record["problem"]] = record
    rows = []
    for (_, solver), found in selections.items():
        heads = [found[head.name] for head in bundle.heads]
        if any(record["pruned"] is None for record in heads):
            continue
        try:
            solutions = [Solution.from_record(record) for record in heads]
            mask = mask_from_solutions(bundle, solutions, method, readout_scope=scope, **windows)
            files = _written(mask, blobs)
        except InputError as error:  # no mask can be made of this bundle; its records are still worth having
            if is_outage(error):
                raise
            log.warning("there is no mask of %s: %s", solver, error)
            continue
        total = math.fsum(record["objective"] for record in heads)
        rows.append({**budget_of(heads[0]), "solver": solver, **files, "objective_sum": total})
    return rows


def _written(mask: KVMask, blobs: BlobStore) -> dict[str, str]:
    """The digests of a mask's two files, which are blobs then."""
    from grace_opt.compression.mask_file import JSON_NAME, TENSORS_NAME, save_mask

    folder = blobs.temporary()
    try:
        save_mask(mask, folder)
        description, tensors = ((folder / name).read_bytes() for name in (JSON_NAME, TENSORS_NAME))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"digest": blobs.put(description), "tensors": blobs.put(tensors)}
