"""The masks of a complete run, made of its records."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from grace_opt.compression.mask import JSON_NAME, TENSORS_NAME, mask_from_solutions, save_mask
from grace_opt.errors import InputError
from grace_opt.graphs import GraphBundle
from grace_opt.records import budget_name
from grace_opt.service.db.blobs import BlobStore
from grace_opt.service.db.database import Row
from grace_opt.solution import Solution

log = logging.getLogger("grace_opt.service")


def masks_of(records: Sequence[Row], bundle: GraphBundle, config: Mapping[str, Any], blobs: BlobStore) -> list[Row]:
    """A mask for each budget and solver that has a selection for every head, written to the blobs.

    Raises OSError if one cannot be written (a full disk).
    """
    selections: dict[tuple[str, str], dict[str, Row]] = {}
    for record in records:
        selections.setdefault((budget_name(record), record["solver"]), {})[record["problem"]] = record
    rows = []
    for (_, solver), found in selections.items():
        heads = [found[head.name] for head in bundle.heads]
        if any(record["pruned"] is None for record in heads):
            continue
        try:
            mask = mask_from_solutions(
                bundle,
                [Solution.from_record(record) for record in heads],
                recent_window=config["recent_window"],
                sinks=config["sinks"],
                readout=config["readout"],
            )
        except InputError as error:  # no mask can be made of this bundle; its records are still worth having
            log.warning("there is no mask of %s: %s", solver, error)
            continue
        budget = {name: heads[0].get(name) for name in ("ratio", "value_ratio", "budget_bytes")}
        files = _written(mask, blobs)
        total = math.fsum(record["objective"] for record in heads)
        rows.append({**budget, "solver": solver, **files, "objective_sum": total})
    return rows


def _written(mask: Any, blobs: BlobStore) -> dict[str, str]:
    """The digests of a mask's two files, which are blobs then."""
    folder = blobs.temporary()
    try:
        save_mask(mask, folder)
        description, tensors = ((folder / name).read_bytes() for name in (JSON_NAME, TENSORS_NAME))
    except InputError as error:  # a full disk, say: wait
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"digest": blobs.put(description), "tensors": blobs.put(tensors)}
