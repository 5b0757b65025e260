"""What is installed is what the project file says, and the repository holds only what it should."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import tierstore

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("tierstore")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail('tierstore is not installed: pip install -e ".[dev]"')


def test_version(installed: importlib.metadata.Distribution) -> None:
    assert installed.version == PROJECT["version"]
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_entry_points_load(installed: importlib.metadata.Distribution) -> None:
    found = {(point.group, point.name): point for point in installed.entry_points}
    assert set(found) == {("console_scripts", "tierstore"), *(("tierstore.policies", name) for name in ("lru", "lookahead", "static"))}
    for point in found.values():
        assert callable(point.load())


def test_what_ships_with_the_code() -> None:
    package = Path(tierstore.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "DESIGN.md").exists()
    assert (package / "FORMAT.md").exists()


def test_license(installed: importlib.metadata.Distribution) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    assert any(str(path).endswith("LICENSE") for path in installed.files or [])


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w.-]+>=[\d.]+", requirement), requirement


def test_the_top_level_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        "tierstore",
        "benchmarks",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    }


def test_the_tour_names_every_module() -> None:
    """The tour in CONTRIBUTING lists each file of the package, and no other."""
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/.]+\.py)`", text, re.MULTILINE)
    package = ROOT / "tierstore"
    files = [path for path in package.rglob("*.py") if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1]  # more than a docstring
    assert sorted(listed) == sorted(path.relative_to(package).as_posix() for path in files)
