"""The same training in plain torch: everything resident, autograd over the whole model, torch's own AdamW. Nothing of tierstore.

Run by its path, not as a module, so that not even the package's `__init__` is imported:

    python plain.py CONFIG.json RESULT.safetensors

CONFIG.json holds the fields of `model.Config`. The result holds every weight and moment under the names that the streamed run uses, and
the loss of each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from tierstore.demo import corpus, model
else:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import corpus
    import model


def train(config: model.Config) -> dict[str, Tensor]:
    """Train from the first step to the last.

    Returns:
        "layer0/layer0.qkv", "optimizer/layer0/exp_avg.layer0.qkv", ..., "losses": block, slash, tensor.
    """
    weights = {part: model.initial_weights(config, part) for part in model.parts(config)}
    weights = {part: {name: tensor.to(config.device).requires_grad_() for name, tensor in group.items()} for part, group in weights.items()}
    parameters = [tensor for group in weights.values() for tensor in group.values()]
    # One implementation out of three: fused differs from this one in the last bit.
    optimizer = torch.optim.AdamW(
        parameters, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, foreach=False, fused=False
    )
    text = corpus.load()
    order = corpus.training_order(text, config.context, config.seed)
    losses = []
    for step in range(config.steps):
        inputs, targets = corpus.training_batch(text, order, step * config.batch, config.batch, config.context)
        for group in optimizer.param_groups:
            group["lr"] = model.learning_rate(config, step)
        optimizer.zero_grad()
        x = model.embed(weights["embedding"], inputs.to(config.device))
        for index in range(config.layers):
            x = model.layer(weights[f"layer{index}"], x, config.heads)
        loss = model.loss(weights["head"], x, targets.to(config.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=False)
        optimizer.step()
        losses.append(loss.item())
    result = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for part, group in weights.items():
        for name, tensor in group.items():
            result[f"{part}/{part}.{name}"] = tensor.detach().cpu()
            for moment in ("exp_avg", "exp_avg_sq"):
                result[f"optimizer/{part}/{moment}.{part}.{name}"] = optimizer.state[tensor][moment].cpu()
    return result


def main(config_path: str, result_path: str) -> None:
    config = model.Config(**json.loads(Path(config_path).read_text(encoding="utf-8")))
    with model.deterministic(config):
        result = train(config)
    loaded = [name for name in sys.modules if name.split(".")[0] == "tierstore"]
    assert not loaded, f"the plain run must import nothing of tierstore, but it imported {loaded}"
    save_file(result, result_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
