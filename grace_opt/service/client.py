"""A typed client of the service; `grace-opt submit | status | fetch` stand on it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from grace_opt.errors import InputError
from grace_opt.files import file_sha256, replacing
from grace_opt.service import schemas
from grace_opt.service.db.tables import UNFINISHED

DEFAULT_URL = "http://127.0.0.1:8080"
POLL_SECONDS = 0.5
RETRIES = 5  #: of requests that may be sent again, while the service is away or busy

Model = TypeVar("Model", bound=BaseModel)


class ServiceError(InputError):
    """The service refused: ``status`` is the HTTP status code, the message its sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Client:
    """Talks to a service. Every method raises ServiceError if the service refuses, InputError if none answers.

    Args:
        url: of the service.
        key: API key, where the service needs one.
    """

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.url = url
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=60)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InputError(f"{url!r} or the API key is not well formed ({error})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def upload(self, path: str | Path) -> schemas.Bundle:
        """Give the service a graph bundle, unless it has it already."""
        path = Path(path)
        digest = file_sha256(path)
        with suppress(ServiceError):
            return self._get(schemas.Bundle, f"/api/bundles/{digest}")

        def blocks() -> Iterator[bytes]:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    yield block

        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
        answer = self._send(
            lambda: self._http.post(
                "/api/bundles", params={"name": path.name, "digest": digest}, content=blocks(), headers=headers
            )
        )
        return _read(schemas.Bundle, answer)

    def submit(
        self,
        bundle: str,
        solvers: Mapping[str, Mapping[str, Any]] | Sequence[str],
        ratios: Sequence[float] = (),
        *,
        value_ratio: float | None = None,
        budget_bytes: Sequence[float] = (),
        method: str = "grace-opt",
        method_options: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        name: str = "",
        idempotency_key: str | None = None,
    ) -> schemas.Run:
        """Submit a run; sent again safely if the answer is lost.

        Args:
            bundle: digest of an uploaded bundle.
            solvers: names, or name -> its options.
            ratios: fractions of the key channels to prune, of each head or of the average one, as the method says.
            value_ratio: fraction of the value channels; that of the key channels if None.
            budget_bytes: beside or in place of ratios: what an old token's keys and values may take in all layers,
                at 16 bits.
            method: name of a method; its channels are chosen by ``solvers``.
            method_options: fields of `grace_opt.compression.method.Method` and of its parts, in place of the method's.
            limits: fields of `schemas.RunLimits`.
            config: fields of `schemas.RunConfig`.
            name: for people.
            idempotency_key: a second submission with the same key gives the same run.
        """
        options = solvers if isinstance(solvers, Mapping) else {name: {} for name in solvers}
        body = {
            "bundle": bundle,
            "solvers": [{"solver": each, "options": dict(options[each])} for each in options],
            "method": method,
            "method_options": dict(method_options or {}),
            "ratios": list(ratios),
            "value_ratio": value_ratio,
            "budget_bytes": list(budget_bytes),
            "limits": dict(limits or {}),
            "config": dict(config or {}),
            "name": name,
        }
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        return _read(schemas.Run, self._send(lambda: self._http.post("/api/runs", json=body, headers=headers)))

    def run(self, run: int) -> schemas.Run:
        """A run."""
        return self._get(schemas.Run, f"/api/runs/{run}")

    def runs(self, limit: int = 50, offset: int = 0) -> schemas.Runs:
        """Runs, the newest first."""
        return self._get(schemas.Runs, "/api/runs", limit=limit, offset=offset)

    def wait(self, run: int, progress: Callable[[schemas.Run], None] = lambda run: None) -> schemas.Run:
        """Wait for the end of a run, across restarts of the service of up to a minute."""
        away: float | None = None
        while True:
            try:
                found = self.run(run)
            except ServiceError:
                raise
            except InputError:
                away = away or time.monotonic()
                if time.monotonic() - away > 60:
                    raise
            else:
                away = None
                progress(found)
                if found.state not in UNFINISHED:
                    return found
            time.sleep(POLL_SECONDS)

    def records(self, run: int, **filters: Any) -> list[dict[str, Any]]:
        """All records of a run, as `grace-opt compare` writes them; ``filters`` are those of the API."""
        found: list[dict[str, Any]] = []
        more = True
        while more:
            parameters = {**filters, "limit": 1000, "offset": len(found)}
            page = self._send(partial(self._http.get, f"/api/runs/{run}/records", params=parameters)).json()
            found += page["records"]
            more = bool(page["records"]) and len(found) < page["total"]
        return found

    def cancel(self, run: int) -> schemas.Run:
        """Stop a run."""
        return _read(schemas.Run, self._send(lambda: self._http.post(f"/api/runs/{run}/cancel")))

    def masks(self, run: int) -> list[schemas.Mask]:
        """The masks of a run."""
        answer = self._send(lambda: self._http.get(f"/api/runs/{run}/masks"))
        return TypeAdapter(list[schemas.Mask]).validate_json(answer.content)

    def fetch(self, mask: schemas.Mask, folder: str | Path) -> None:
        """Write a mask's two files to a folder, checked against their digests."""
        from grace_opt.compression.mask_file import JSON_NAME, TENSORS_NAME  # loads torch

        folder = Path(folder)
        # As `save_mask` does: the JSON, which holds the other's sha256, comes last.
        with replacing(folder / JSON_NAME) as json_file, replacing(folder / TENSORS_NAME) as tensor_file:
            for file, ending, digest in (
                (tensor_file, "safetensors", mask.tensors),
                (json_file, "json", mask.digest),
            ):
                path = f"/api/masks/{mask.digest}.{ending}"
                file.write_bytes(self._send(partial(self._http.get, path)).content)
                if file_sha256(file) != digest:
                    raise InputError(f"{self.url}{path} arrived damaged; fetch it again")

    def solvers(self) -> list[schemas.SolverInfo]:
        """The solvers that the service knows."""
        answer = self._send(lambda: self._http.get("/api/solvers"))
        return TypeAdapter(list[schemas.SolverInfo]).validate_json(answer.content)

    def _get(self, model: type[Model], path: str, **parameters: Any) -> Model:
        return _read(model, self._send(lambda: self._http.get(path, params=parameters)))

    def _send(self, request: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer; requests that fail for the moment are sent again, as all of ours may be."""
        for attempt in range(RETRIES):
            last = attempt == RETRIES - 1
            try:
                answer = request()
            except (httpx.TransportError, OSError) as error:
                if last or isinstance(error, httpx.UnsupportedProtocol | httpx.ConnectError):
                    raise InputError(
                        f"no grace-opt service answers at {self.url} ({error or type(error).__name__}); "
                        "start one with grace-opt serve, or give its address with --url"
                    ) from None
                time.sleep(0.2 * 2**attempt)
                continue
            if answer.status_code in (429, 503) and not last:
                time.sleep(min(5.0, float(answer.headers.get("Retry-After", "1"))))
                continue
            if answer.status_code >= 400:
                raise ServiceError(answer.status_code, _sentence(answer))
            return answer
        raise AssertionError


def _read(model: type[Model], answer: httpx.Response) -> Model:
    try:
        return model.model_validate_json(answer.content)
    except ValidationError:
        raise InputError(f"what answers at {answer.url} is not a grace-opt service of this version") from None


def _sentence(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.url} answered {answer.status_code}"
