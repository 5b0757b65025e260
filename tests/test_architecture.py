"""The shape of the house: who may import whom, what stays pure, and which names are public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tierstore

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tierstore"

# A module imports only from what stands before it. An entry covers what lies below it, unless that has an entry of its own.
# Inside one entry imports are free. "" is tierstore/__init__.py, the face that users import.
ORDER = [
    *("errors", "units", "clock", "threads", "hardware", "catalog", "residency", "arena", "monitor.perfetto", "trace", "counters"),
    *("pace", "policies", "requests", "extents", "placement", "fitness", "leases", "waiting", "scheduler", "tiers", "nvme", "mover"),
    *("inputs", "opening", "store", "sync", "monitor", "training", "planner"),
    *("huggingface", "distributed", "<face>", "testing", "demo", "export", "printing", "finetune", "commands", "cli", "__main__"),
]

# Whether directly or through what they import.
PURE = (
    *("catalog", "residency", "arena", "pace", "policies", "requests", "extents", "placement", "fitness", "leases", "waiting", "scheduler"),
    *("planner.fit", "planner.simulate", "training.advice"),
)
NOT_PURE = {"torch", "asyncio"}

# They are what tierstore is compared with: they import nothing of it but one another.
STRANGERS = (
    *("demo.plain", "demo.model", "demo.corpus", "testing.reference"),
    *(f"demo.smollm2.{name}" for name in ("plain", "model", "recipe", "text", "tokenizer")),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it; the face is ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Full names of what a module imports anywhere in it, and the line."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = ["tierstore", *module.split(".")] if module else ["tierstore"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                yield (inside if own_name(inside) in MODULES else base), node.lineno


def own_name(full: str) -> str | None:
    """The name within the package, None for what is not ours."""
    if full == "tierstore":
        return ""
    return full.removeprefix("tierstore.") if full.startswith("tierstore.") else None


def own_imports(module: str) -> Iterator[tuple[str, int]]:
    for full, line in imports(module):
        name = own_name(full)
        if name is not None:
            yield name, line


def entry(module: str) -> str | None:
    """The longest entry of ORDER that covers a module."""
    parts = module.split(".") if module else ["<face>"]
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in ORDER), None)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "tierstore")
def test_imports_only_from_above(module: str) -> None:
    where = MODULES[module].relative_to(ROOT)
    own = entry(module)
    assert own is not None, f"{where} has no place in the order: add it to ORDER, and to the design document"
    for imported, line in own_imports(module):
        theirs = entry(imported)
        assert theirs is not None, f"{where}:{line} imports tierstore.{imported}, which has no place in the order"
        # A package may have parts with a place of their own; importing them runs its __init__, which is empty of imports.
        assert ORDER.index(theirs) <= ORDER.index(own), f"{where}:{line} imports tierstore.{imported}, which stands below it"


@pytest.mark.parametrize("module", [name for name in MODULES if any(name == pure or name.startswith(f"{pure}.") for pure in PURE)])
def test_pure_modules_stay_pure(module: str) -> None:
    seen, waiting = {module}, [(module, (str(MODULES[module].relative_to(ROOT)),))]
    while waiting:
        current, route = waiting.pop()
        for full, line in imports(current):
            assert full.split(".")[0] not in NOT_PURE, f"{' -> '.join(route)}:{line} imports {full}"
            name = own_name(full)
            if name and name in MODULES and name not in seen:
                seen.add(name)
                waiting.append((name, (*route, str(MODULES[name].relative_to(ROOT)))))


@pytest.mark.parametrize("module", [name for name in STRANGERS if name in MODULES])
def test_what_we_are_compared_with_imports_nothing_of_ours(module: str) -> None:
    for imported, line in own_imports(module):
        assert imported in STRANGERS, f"{MODULES[module].relative_to(ROOT)}:{line} imports tierstore.{imported}"


@pytest.mark.parametrize("package", ["monitor", "testing"])
def test_packages_whose_parts_stand_apart_are_empty(package: str) -> None:
    if package in MODULES:
        assert list(own_imports(package)) == [], MODULES[package].relative_to(ROOT)


def test_public_names_are_frozen() -> None:
    frozen = (ROOT / "tests" / "public_names.txt").read_text(encoding="utf-8").split()
    assert sorted(tierstore.__all__) == sorted(frozen), "a name was added or removed: change tests/public_names.txt, and the changelog"
    for name in frozen:
        assert hasattr(tierstore, name)


def test_the_walk_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative imports, imports inside functions and `from tierstore import module` all count."""
    source = """
        from . import lru
        from ..errors import SizeError
        def late():
            import tierstore.store
            from tierstore import cli, TierStore
    """
    path = tmp_path / "example.py"
    path.write_text("if True:\n" + source, encoding="utf-8")
    monkeypatch.setitem(MODULES, "policies.example", path)
    monkeypatch.setitem(MODULES, "cli", path)
    assert [name for name, _ in own_imports("policies.example")] == ["policies.lru", "errors", "store", "cli", ""]
