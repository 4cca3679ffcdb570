"""A connector whose stored prompts are deleted after vLLM has decided to load them."""

from __future__ import annotations

from typing import Any

from grace_opt.export.vllm_plugin.connector import GraceOptConnector, Step


class Vanishing(GraceOptConnector):
    """As its name says."""

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        step = super().build_connector_meta(scheduler_output)
        for load in step.loads:
            self._folder.path(load.name).unlink()
        return step
