"""What all routes share: the storage, the cluster, the runner, who may do what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grace_opt.compare import summarise, with_references
from grace_opt.engines.dask import Cluster
from grace_opt.errors import InputError, shown
from grace_opt.files import file_sha256
from grace_opt.graphs import load_bundle
from grace_opt.reading import opened
from grace_opt.records import budget_name, budget_of
from grace_opt.service.db.database import Row
from grace_opt.service.db.storage import Storage
from grace_opt.service.http.access import Access
from grace_opt.service.http.page_cache import PageCache
from grace_opt.service.runner import Runner

NAME_LENGTH = 100  #: characters of a registered file's name, some of which take two when shown


class Service:
    """One running service.

    Args:
        storage: opened, and alone.
        cluster: where to solve.
        keys_required: whether each request needs an API key.
        upload_limit: bytes of a bundle.
        queue_limit: unfinished runs.
        requests_per_second: of each API key.
    """

    def __init__(
        self,
        storage: Storage,
        cluster: Cluster,
        *,
        keys_required: bool = False,
        upload_limit: int = 1 << 30,
        queue_limit: int = 100,
        requests_per_second: float = 100.0,
    ) -> None:
        self.storage, self.cluster = storage, cluster
        self.upload_limit, self.queue_limit = upload_limit, queue_limit
        self.access = Access(storage.keys, keys_required, requests_per_second)
        self.runner = Runner(storage, cluster)
        self.pages = PageCache()

    def start(self) -> None:
        """Go on with what is unfinished."""
        self.runner.start()

    def stop(self) -> None:
        """Stop working; what is unfinished stays so, in the storage."""
        self.runner.stop()
        self.cluster.close()
        self.storage.close()

    def register(self, path: Path) -> Row:
        """Take a copy of a bundle's file."""
        temporary = self.storage.blobs.temporary()
        try:
            with temporary.open("wb") as copy:
                for block in _blocks(path):  # its size is no promise: it may be growing
                    copy.write(block)
                    if copy.tell() > self.upload_limit:
                        most = self.upload_limit
                        raise InputError(f"a bundle may have {most} bytes (grace-opt serve --upload-limit)")
            return self.adopt_bundle(temporary, file_sha256(temporary), shown(path.name, NAME_LENGTH))
        finally:
            temporary.unlink(missing_ok=True)

    def adopt_bundle(self, temporary: Path, digest: str, name: str) -> Row:
        """Check a file and make it a bundle of the service. Raises InputError if it is not a sound one."""
        bundles, blobs = self.storage.bundles, self.storage.blobs
        known = bundles.find(digest)
        if known is not None and blobs.is_sound(digest):
            return known
        try:
            bundle = load_bundle(temporary)
            bundle.check()  # finds NaN and asymmetry
        except InputError as error:
            raise InputError(str(error).replace(str(temporary), "the file")) from None
        blobs.adopt(temporary, digest)
        nbytes = blobs.path(digest).stat().st_size
        return bundles.add(digest, name, nbytes, len(bundle.heads), bundle.metadata)

    def compared(self, runs: Sequence[Row]) -> dict[str, Any]:
        """The runs, their summaries one below the other, and how they differ on the heads that all of them have."""
        found = [self.storage.records.all(run["id"]) for run in runs]
        known = [record for records in found for record in records]
        found = [with_references(records, known, {}) for records in found]  # the best that any of the runs knows
        tables = [{(budget_name(r), r["solver"], r["problem"]): r for r in records} for records in found]
        shared = [key for key in tables[0] if all(key in table for table in tables[1:])]
        differences = []
        for key in shared:
            records = [table[key] for table in tables]
            pruned = [set(record["pruned"]) for record in records if record["pruned"] is not None]
            common = len(set.intersection(*pruned)) if len(pruned) == len(records) else None
            differences.append(
                {
                    **budget_of(records[0]),
                    "solver": records[0]["solver"],
                    "problem": records[0]["problem"],
                    "prune": [record["prune"] for record in records],
                    "objective": [record["objective"] for record in records],
                    "pruned_by_all": common,
                }
            )
        summary = [
            {"run": run["id"], **row} for run, records in zip(runs, found, strict=True) for row in summarise(records)
        ]
        return {"runs": list(runs), "summary": summary, "differences": differences}


def _blocks(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        while block := file.read(1 << 20):
            yield block
