"""Inputs of layers that wait in the store for the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tierstore import TierStore
from tierstore.training import attach


@pytest.mark.parametrize("tier", ["ram", "nvme"])
def test_inputs_that_come_to_lie_where_others_lay(tier: str, tmp_path: Path) -> None:
    """An input in the store is let go on the device, and the next one may lie at the same address: they were taken for the same."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(12)])
    x = torch.randn(128, 128)
    resident = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), resident, strict=True)), (x,)).square().sum().backward()
    with TierStore(gpu=300_000, ram=4_000_000, nvme=tmp_path, device="cpu") as store:
        tiered = attach(model, store, list(model), activations=tier)  # type: ignore[arg-type]
        model(x).square().sum().backward()
        assert any(name.startswith("activations/") for name in store)
        for name, parameter in zip([weight.name for weight in tiered.structure.weights], resident, strict=True):
            grad, want = tiered.gradient(name), parameter.grad
            assert grad is not None
            assert want is not None
            assert torch.equal(grad, want), name
        tiered.detach()
