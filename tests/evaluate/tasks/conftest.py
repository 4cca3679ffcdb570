"""What tests of tasks share: the tokenizer of the real model."""

from __future__ import annotations

from typing import Any

import pytest

from grace_opt.models.load import smollm2_folder


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())
