"""How many tokens in a row a model can take: some look positions up in a table, which ends."""

from __future__ import annotations

from typing import Any

from torch import nn

from tierstore.errors import OptionError

MOST_OFFSET = 8
"""Rows that a table may have beside those for positions: OPT's has 2."""


def num_positions(model: Any) -> int | None:
    """Tokens of the longest sequence that the model can take; None: there is no end, as with rotary positions.

    A table is an embedding other than that of tokens, or a matrix among the buffers, of as many rows as the configuration has positions.
    """
    wanted = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(wanted, int) or wanted <= 0:
        return None
    found: list[int] = []
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens and 0 <= module.num_embeddings - wanted <= MOST_OFFSET:
            before = module.padding_idx + 1 if module.padding_idx is not None else 0  # positions begin behind it, as in RoBERTa
            found.append(min(wanted, module.num_embeddings - before))
        found += [wanted for buffer in module._buffers.values() if buffer is not None and buffer.ndim == 2 and buffer.shape[0] == wanted]
    return min(found, default=None)


def check_positions(model: Any, tokens: int, *, what: str, remedy: str) -> None:
    """Refuse a sequence that is longer than the model's table of positions.

    Args:
        model: Of transformers, or of PEFT over one.
        tokens: Those that it is to be given in a row.
        what: What is that long.
        remedy: What to do; `{most}` in it becomes the number that can be taken.

    Raises:
        OptionError: It is longer.
    """
    most = num_positions(model)
    if most is not None and tokens > most:
        raise OptionError(
            f"{what} for this model, which has a table of positions",
            need=f"{tokens} positions",
            have=f"{most} (max_position_embeddings in its config.json)",
            remedy=remedy.format(most=most),
        )
