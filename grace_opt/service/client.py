"""A typed client of the service; `grace-opt submit | status | fetch` stand on it."""

from __future__ import annotations

import math
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
from grace_opt.service.network import transport_options

DEFAULT_URL = "http://127.0.0.1:8080"
POLL_SECONDS = 0.5
RETRIES = 5  #: of requests that may be sent again, while the service is away or busy
BUSY = (429, 502, 503, 504)  #: answers, of the service or of a proxy before it, that another try may better
LONGEST_PAUSE = 5.0  #: seconds between two tries

Model = TypeVar("Model", bound=BaseModel)


class ServiceError(InputError):
    """The service refused: ``status`` is the HTTP status code, the message its sentence."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Client:
    """Talks to a service. Every method raises ServiceError if the service refuses, InputError if none answers.

    A proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, less what NO_PROXY does) is used, but never
    for a service on this machine; SSL_CERT_FILE and SSL_CERT_DIR name authorities of certificates. A netrc file is not
    read: the key is all that is sent.

    Args:
        url: of the service.
        key: API key, where the service needs one.
        patience: seconds for which a service that has answered once may be away, or its database: until then requests
            are sent again. None: a few tries. ``math.inf``: until it is back.
        waiting: is told in a sentence, once an outage, what is being waited for.

    Raises:
        InputError: if the address, the key, or what the environment says of proxies and certificates is of no use.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        key: str | None = None,
        *,
        patience: float | None = None,
        waiting: Callable[[str], None] = lambda why: None,
    ) -> None:
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError("the API key has characters that no key has; give it as grace-opt keys add printed it")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.patience, self.waiting = url, patience, waiting
        self._met = False  # whether the service has ever answered
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=60, **transport_options(url))  # type: ignore[arg-type]
        except (httpx.InvalidURL, UnicodeError) as error:
            raise InputError(
                f"{url!r} is not the address of a service ({error}); give one like {DEFAULT_URL}"
            ) from None

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

    def wait(
        self,
        run: int,
        progress: Callable[[schemas.Run], None] = lambda run: None,
        *,
        timeout: float | None = None,
    ) -> schemas.Run:
        """Wait for the end of a run, across outages of the service and its database, however long.

        Args:
            run: its id.
            progress: is given the run each time that it was asked for.
            timeout: seconds after which to give up; None: never.

        Raises:
            InputError: if the run has not ended then; it goes on all the same.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            found = self._get(schemas.Run, f"/api/runs/{run}", patience=max(0.0, left))
            progress(found)
            if found.state not in UNFINISHED:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise InputError(
                    f"run {run} has not ended in {timeout:g} s: it is {found.state}, {found.done} of {found.total}; "
                    f"it goes on, and grace-opt status {run} --wait follows it"
                )
            time.sleep(min(POLL_SECONDS, left))

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

    def _get(self, model: type[Model], path: str, *, patience: float | None = None, **parameters: Any) -> Model:
        return _read(model, self._send(lambda: self._http.get(path, params=parameters), patience))

    def _send(self, request: Callable[[], httpx.Response], patience: float | None = None) -> httpx.Response:
        """The answer; requests that fail for the moment are sent again, as all of ours may be."""
        patience = self.patience if patience is None else patience
        began, attempt, pause = time.monotonic(), 0, 0.0
        while True:
            attempt += 1
            try:
                answer = request()
            except (httpx.TransportError, OSError) as error:
                trouble: InputError = self._silence(error)
                passes = self._met or not isinstance(error, httpx.ConnectError)
                passes = passes and not isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
                pause = min(LONGEST_PAUSE, 0.2 * 2**attempt)
            else:
                self._met = True
                if answer.is_redirect:
                    where = answer.headers.get("Location", "another address")
                    raise InputError(f"{self.url} sends to {where}; give the service's own address with --url")
                if answer.status_code < 400:
                    return answer
                trouble = ServiceError(answer.status_code, _sentence(answer))
                passes = answer.status_code in BUSY
                pause = _retry_after(answer)
            left = math.inf if patience is None else patience - (time.monotonic() - began)
            if not passes or left <= 0 or (patience is None and attempt == RETRIES):
                raise trouble
            if attempt == 2:  # not for a hiccup
                self.waiting(f"waiting for {self.url}: {trouble}")
            time.sleep(min(pause, left))

    def _silence(self, error: Exception) -> InputError:
        """What it means that there is no answer."""
        said = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return InputError(
                f"the certificate of {self.url} is not one to trust ({said}); name the file of its authority in "
                "SSL_CERT_FILE"
            )
        if "[SSL" in said:
            return InputError(
                f"{self.url} does not speak https ({said}); give its address with http:// or mend its TLS"
            )
        return InputError(
            f"no grace-opt service answers at {self.url} ({said}); "
            "start one with grace-opt serve, or give its address with --url"
        )


def _retry_after(answer: httpx.Response) -> float:
    """Seconds to the next try; a proxy may name a date in place of them."""
    try:
        return min(LONGEST_PAUSE, max(0.1, float(answer.headers.get("Retry-After", "1"))))
    except ValueError:
        return 1.0


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
