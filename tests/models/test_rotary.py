"""Keys before RoPE, beside what the model's own function was given."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from grace_opt.errors import InputError
from grace_opt.models.rotary import Turn, rotary_of
from tests.support.families import FAMILIES, tiny_model

SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "linear": {"factor": 2.0},
}


def keys_of(model: Any, monkeypatch: pytest.MonkeyPatch, tokens: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> keys [H, T, n] as the model's function got them and as it gave them, of a random prompt."""
    from grace_opt.models.attention import attending_with, observing

    source = sys.modules[type(model).__module__]
    turn = getattr(source, "apply_rotary_pos_emb", None)
    before: list[torch.Tensor] = []
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def recording(query: Any, key: Any, *more: Any, **options: Any) -> Any:
        before.append(key[0])
        return turn(query, key, *more, **options)

    if turn is not None:
        monkeypatch.setattr(source, "apply_rotary_pos_emb", recording)

    def see(module: Any, query: Any, key: Any, value: Any, scaling: float, arguments: dict[str, Any]) -> None:
        given = before.pop() if before else key[0]
        whole = torch.cat([given, key[0][..., given.shape[-1] :]], dim=-1)  # of some, what is turned alone
        if arguments.get("sliding_window") is None:
            found[module.layer_idx] = whole, key[0]

    ids = torch.randint(3, 99, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attending_with(model, observing(see)):
        model.base_model(input_ids=ids, use_cache=False)
    monkeypatch.undo()
    return found


def check(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer, (before, after) in keys_of(model, monkeypatch, 150).items():
        turn = Turn(rotary_of(model), layer)
        torch.testing.assert_close(turn.back(after), before, atol=1e-4, rtol=1e-4)
        if turn.table is not None:
            forth = turn.table.forth(before, torch.arange(150))
            torch.testing.assert_close(forth, after, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_before_rope_are_what_the_model_turned(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny_model(family), monkeypatch)


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies_and_factors_are_the_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tiny_model("Llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}), monkeypatch)


def test_layers_without_rope_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("SmolLM3", sliding_window=None, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])
    assert [table is not None for table in rotary_of(model).layers().values()] == [True, False, True, False]
    check(model, monkeypatch)


def test_rows_of_a_batch_turn_by_their_own_positions() -> None:
    model = tiny_model("Cohere")
    turn = Turn(rotary_of(model), 0)
    turn.reach(30)
    assert turn.table is not None
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 1, 2, 3, 4], [20, 21, 22, 23, 24]])
    for row in range(2):
        alone = turn.table.forth(x[row], positions[row])
        torch.testing.assert_close(turn.table.forth(x, positions)[row], alone)
    torch.testing.assert_close(turn.table.back(turn.table.forth(x, positions), positions), x)


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    model = tiny_model("Llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    with pytest.raises(InputError, match=r"dynamic.* changes with the length of the text; use a codec"):
        rotary_of(model).layers()


def test_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama").bfloat16()
    for layer, (before, after) in keys_of(model, monkeypatch, 60).items():
        back = Turn(rotary_of(model), layer).back(after)
        torch.testing.assert_close(back, before, atol=0.05, rtol=0.02)
