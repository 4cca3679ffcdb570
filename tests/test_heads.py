"""The name of a head is built and taken apart in one place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_opt import InputError
from grace_opt.heads import KINDS, HeadName


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(KINDS))
def test_a_name_comes_back_from_its_text(layer: int, kv_head: int, kind: str) -> None:
    name = HeadName(layer, kv_head, kind)  # type: ignore[arg-type]
    assert str(name) == f"layers.{layer}.kv_heads.{kv_head}.{kind}"
    assert HeadName.parse(str(name)) == HeadName.match(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "problem",
        "layers.3.kv_heads.1",
        "layers.3.kv_heads.1.keys",
        "layers.-3.kv_heads.1.key",
        "layers.3.k.kv_heads.1.key",
    ],
)
def test_a_text_that_names_no_head_is_none_or_a_sentence(text: str) -> None:
    assert HeadName.match(text) is None
    with pytest.raises(InputError, match="names no head; heads are named like layers.3.kv_heads.1.key"):
        HeadName.parse(text)
