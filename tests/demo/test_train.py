"""The hand-written loop's arithmetic, against torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tierstore.demo import model, plain
from tierstore.demo.model import Config


def test_parts_can_be_made_in_any_order(tiny: Config) -> None:
    forwards = {part: model.initial_weights(tiny, part) for part in model.parts(tiny)}
    for part in reversed(model.parts(tiny)):
        again = model.initial_weights(tiny, part)
        assert again.keys() == forwards[part].keys()
        assert all(torch.equal(again[name], forwards[part][name]) for name in again)
    assert not torch.equal(forwards["layer0"]["qkv"], forwards["layer1"]["qkv"])


def test_no_token_sees_the_future(tiny: Config) -> None:
    weights = {part: model.initial_weights(tiny, part) for part in model.parts(tiny)}

    def features(tokens: torch.Tensor) -> torch.Tensor:
        x = model.embed(weights["embedding"], tokens)
        for index in range(tiny.layers):
            x = model.layer(weights[f"layer{index}"], x, tiny.heads)
        return x

    tokens = torch.arange(24).view(1, 24)
    changed = tokens.clone()
    changed[0, 15] = 200
    before, after = features(tokens), features(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_recording_gradients_changes_no_bit(tiny: Config) -> None:
    weights = {name: tensor.requires_grad_() for name, tensor in model.initial_weights(tiny, "layer1").items()}
    x = torch.randn(4, 32, tiny.width, generator=torch.Generator().manual_seed(1))
    recorded = model.layer(weights, x, tiny.heads)
    with torch.no_grad():
        assert torch.equal(model.layer(weights, x, tiny.heads), recorded)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = Config(steps=100, warmup_steps=10, peak_lr=1.0)
    rates = [model.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[40] == 1.0
    assert rates[70] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.02


def test_deterministic_settings_are_put_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    with model.deterministic(Config(threads=1)):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()) == before


def test_the_plain_run_refuses_to_run_beside_tierstore(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"steps": 1, "layers": 1, "width": 16, "heads": 1, "context": 8, "batch": 1}')
    with pytest.raises(AssertionError, match="must import nothing of tierstore"):  # imported here as part of the package
        plain.main(str(config), str(tmp_path / "result.safetensors"))
