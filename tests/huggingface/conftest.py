"""What tests of models of transformers share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from tests.torch_threads import torch_threads


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars, and one thread: these tensors are small."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.WARNING)
    with torch_threads(1), warnings.catch_warnings():
        yield
