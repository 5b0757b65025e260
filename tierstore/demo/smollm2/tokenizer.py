"""SmolLM2's tokenizer, from the vocabulary and the merges alone. Imports nothing of tierstore."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

KIND = ("gpt2", "smollm")
"""What a GGUF calls it: byte-level pairs as in GPT-2, after numbers have been cut into digits."""


def build(tokens: Sequence[str], merges: Sequence[str], control: Sequence[str]) -> Tokenizer:
    """Make the tokenizer.

    Args:
        tokens: By id.
        merges: Pairs with a space between, those that come first first.
        control: Tokens that stand for themselves in a text, such as "<|endoftext|>".
    """
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer
