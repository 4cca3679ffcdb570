"""The OpenAPI document is valid 3.1, and a client that is generated from it works."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest
from openapi_python_client import MetaType, generate
from openapi_python_client.config import Config, ConfigFile
from openapi_spec_validator import OpenAPIV31SpecValidator

from grace_opt.service.http.access import new_key
from grace_opt.service.http.app import create_app
from grace_opt.service.http.site import Site
from grace_opt.service.http.state import Service
from tests.support.setting import CONTENT, DIGEST, Setting

PACKAGE = "generated_grace_opt_client"


def document(site: Site = Site()) -> dict[str, Any]:  # noqa: B008
    return cast("dict[str, Any]", json.loads(json.dumps(create_app(cast(Service, None), site).openapi())))


def test_the_document_is_valid() -> None:
    made = document()
    assert made["openapi"].startswith("3.1")
    assert list(OpenAPIV31SpecValidator(made).iter_errors()) == []
    assert made["servers"] == [{"url": "/"}]
    assert document(Site("https://a.example", "/b", None))["servers"] == [{"url": "https://a.example/b"}]
    names = [operation["operationId"] for path in made["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Setting, str]]:
    with Setting(tmp_path_factory.mktemp("openapi"), None, keys_required=True) as found:
        key = new_key()
        found.storage.keys.add("ada", key, "admin")
        yield found, key


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package that openapi-python-client makes of the document."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "openapi.json").write_text(json.dumps(document()))
    config = Config.from_sources(
        config_file=ConfigFile(post_hooks=[]),  # no formatting
        meta_type=MetaType.NONE,
        document_source=folder / "openapi.json",
        file_encoding="utf-8",
        overwrite=False,
        output_path=folder / PACKAGE,
    )
    said = generate(config=config, custom_template_path=None)
    assert [str(error) for error in said] == []  # nothing was left out of the client
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(PACKAGE)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]


def test_a_generated_client_does_what_ours_does(setting: tuple[Setting, str], generated: Any) -> None:
    service, key = setting

    def call(name: str, /, *arguments: Any, **options: Any) -> Any:
        module = importlib.import_module(f"{PACKAGE}.api.default.{name}")
        return module.sync_detailed(*arguments, client=client, **options)

    models = importlib.import_module(f"{PACKAGE}.models")
    types = importlib.import_module(f"{PACKAGE}.types")
    client = generated.AuthenticatedClient(base_url=service.url, token=key, timeout=60)
    import io

    assert call("upload_bundle", body=types.File(io.BytesIO(CONTENT)), name="heads").parsed.digest == DIGEST
    choice = models.SolverChoice(solver="greedy")
    asked = models.RunRequest(bundle=DIGEST, solvers=[choice], ratios=[0.5])
    assert call("submit_run", body=asked).status_code == 202
    assert "end" in call("watch_run", 1).content.decode()
    assert [(run.id, run.state.value) for run in call("list_runs").parsed.runs] == [(1, "complete")]
    assert call("list_records", 1, solver="greedy", limit=5).parsed.total == 12
    (mask,) = call("list_masks", 1).parsed
    made = call("get_mask_json", mask.digest).parsed
    assert made.to_dict()["format"] == "kv-channel-mask"
    tensors = call("get_mask_tensors", mask.digest).parsed.payload.read()
    assert hashlib.sha256(tensors).hexdigest() == mask.tensors
    assert "grace_opt_runs" in str(call("get_metrics").parsed)
    assert call("health").parsed.status == "ok"
    missing = call("get_run", 99)
    assert (missing.status_code, missing.parsed.detail) == (404, "there is no run 99")
    refused = call("submit_run", body=models.RunRequest(bundle=DIGEST, solvers=[choice], ratios=[7.0]))
    assert (refused.status_code, refused.parsed.status) == (422, 422)
    assert "must be less than 1" in refused.parsed.detail
    assert call("delete_run", 1).status_code == 204
