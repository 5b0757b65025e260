"""The same fine-tuning in plain torch: everything resident, transformers' own loading, torch's own AdamW. Nothing of tierstore.

Run by its path, not as a module, so that not even the package's `__init__` is imported:

    python plain.py MODEL RECIPE.json RESULT.safetensors

MODEL is the directory of the converted model; RECIPE.json holds the fields of `recipe.Recipe`. The result holds every parameter under
its name, its moments as "exp_avg.<name>" and "exp_avg_sq.<name>", and the loss of each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

if TYPE_CHECKING:
    from tierstore.demo.smollm2 import model as models
    from tierstore.demo.smollm2 import recipe as recipes
    from tierstore.demo.smollm2 import text as texts
else:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import model as models
    import recipe as recipes
    import text as texts


def train(directory: Path, recipe: recipes.Recipe) -> dict[str, Tensor]:
    """Train from the first step to the last.

    Returns:
        "model.norm.weight", "exp_avg.model.norm.weight", ..., "losses".
    """
    text = texts.load(models.load_tokenizer(directory))
    model = LlamaForCausalLM.from_pretrained(directory, config=models.load_config(directory), dtype=torch.float32, local_files_only=True)
    model.to(recipe.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    losses = []
    for tokens in texts.training_batches(text, recipe):
        loss = models.language_loss(model, tokens.to(recipe.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    result = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in model.named_parameters():
        result[name] = parameter.detach().cpu()
        result |= {f"{moment}.{name}": optimizer.state[parameter][moment].cpu() for moment in ("exp_avg", "exp_avg_sq")}
    return result


def main(directory: str, recipe_path: str, result_path: str) -> None:
    models.silence_transformers()
    recipe = recipes.Recipe(**json.loads(Path(recipe_path).read_text(encoding="utf-8")))
    with recipes.deterministic(recipe):
        result = train(Path(directory), recipe)
    loaded = [name for name in sys.modules if name.split(".")[0] == "tierstore"]
    assert not loaded, f"the plain run must import nothing of tierstore, but it imported {loaded}"
    save_file(result, result_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
