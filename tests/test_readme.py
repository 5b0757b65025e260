"""The README does what it says: its Python runs, its links lead somewhere, its commands and calls exist."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tierstore

ROOT = Path(__file__).parents[1]
GUIDES = (ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md")  # what stands in them in Python must run
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted({*GUIDES, *ROOT.glob("*/*.md"), *ROOT.glob(".github/*.md")})}
README = PAGES[ROOT / "README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PYTHON = [pytest.param(code, id=f"{path.name}-{n}") for path in GUIDES for n, code in enumerate(blocks(PAGES[path], "python"))]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    # The tree that is being tested, installed or not, from a directory that is neither.
    environment = os.environ | {"PYTHONPATH": str(Path(tierstore.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_first_two_bash_blocks_are_the_two_commands() -> None:
    demo, test = blocks(README, "bash")[:2]
    assert 'pip install ".[demo]"' in demo
    assert "tierstore demo" in demo
    assert 'pip install ".[test]"' in test
    assert "pytest" in test


def test_what_it_says_to_install_is_there_and_is_enough() -> None:
    assert not re.findall(r"pip install \"?tierstore", README), "it is not in any index yet: `.` is the clone"
    section = README.partition("## Models from the Hugging Face Hub")[2].partition("\n## ")[0]
    found = re.search(r'pip install "\.\[([\w,]+)\]"', section)
    assert found
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    brought = {re.split(r"[>=<]", requirement)[0] for extra in found[1].split(",") for requirement in extras[extra]}
    assert brought >= {"transformers", "tokenizers", "peft", "matplotlib"}, "`finetune` draws the losses unless told not to"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                f"{page.name} links to {target}"
            )


def test_every_call_of_the_table_exists() -> None:
    table = README.partition("## Calls")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    calls = re.findall(r"`(\w+)(?:\(([^`]*)\))?`", " ".join(rows))
    assert len(calls) >= 15
    for name, written in calls:
        if name in ("iter", "len"):
            assert hasattr(tierstore.TierStore, f"__{name}__")
            continue
        member = inspect.getattr_static(tierstore.TierStore, name)
        if written:
            given = [part.split("=")[0].strip() for part in written.split(",")]
            known = [str(parameter).split(":")[0].split("=")[0].strip() for parameter in inspect.signature(member).parameters.values()]
            assert set(given) - {"*"} <= set(known), f"{name}({written}) is {known}"
