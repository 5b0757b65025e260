"""Hypothesis profiles, which devices the tests run on, and which way files go."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.nvme.kernel32 import stand_in
from tierstore.nvme import local
from tierstore.nvme.system import Posix, System

# Deadlines measure the machine, not the code; too slow a test is ended by pytest-timeout.
settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

HAS_CUDA = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default=None, help="run tests that take `device` on this one only")
    ways = "the portable path / the same, through the calls of Windows, which a stand-in answers"
    parser.addoption("--files", choices=["native", *WAYS], default="native", help=f"what files go through unless a test says: {ways}")


WAYS: dict[str, Callable[[], tuple[System, bool]]] = {
    "portable": lambda: (Posix(), True),
    "windows": lambda: (stand_in(record=False)[0], True),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native_files: holds only where files go the machine's own way")
    if config.getoption("--files") in WAYS:
        local.native = WAYS[config.getoption("--files")]
    config.addinivalue_line("markers", "cuda: needs a GPU that torch can use")
    if config.getoption("--device") == "cuda" and not HAS_CUDA:
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Shells start what runs in the background with SIGINT ignored, and Python leaves it so; tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_CUDA else [])])
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is, one after the other."""
    wanted = request.config.getoption("--device")
    if wanted not in (None, request.param):
        pytest.skip(f"--device {wanted}")
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def log_level() -> None:
    """A benchmark run by an earlier test may have silenced the log."""
    logging.getLogger("tierstore").setLevel(logging.NOTSET)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--files") != "native":
        for item in items:
            if item.get_closest_marker("native_files"):
                item.add_marker(pytest.mark.skip(reason=f"--files {config.getoption('--files')}"))
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
