"""Replacement policies, and the registry that finds them by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from inspect import getattr_static

from tierstore.errors import OptionError
from tierstore.policies.arc import Arc
from tierstore.policies.base import Policy, PolicyBase, View
from tierstore.policies.clock import Clock
from tierstore.policies.fifo import Fifo
from tierstore.policies.lookahead import Lookahead
from tierstore.policies.lru import Lru
from tierstore.policies.s3fifo import S3Fifo
from tierstore.policies.sieve import Sieve
from tierstore.policies.static import Static

GROUP = "tierstore.policies"
"""Entry-point group in which packages register a policy class or factory under a name."""

_OURS: dict[str, Callable[[], Policy]] = {
    "lookahead": Lookahead,
    "static": Static,
    # for comparison: these know only the past
    "lru": Lru,
    "fifo": Fifo,
    "clock": Clock,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "arc": Arc,
}

__all__ = [
    "GROUP",
    "Arc",
    "Clock",
    "Fifo",
    "Lookahead",
    "Lru",
    "Policy",
    "PolicyBase",
    "S3Fifo",
    "Sieve",
    "Static",
    "View",
    "available",
    "resolve",
]


def available() -> list[str]:
    """Names that `policy=` accepts, ours and those of installed packages."""
    return sorted({*_OURS, *(point.name for point in entry_points(group=GROUP))})


def resolve(policy: str | Policy | type) -> Policy:
    """The policy object for a name, a class or an object with the protocol.

    Raises:
        OptionError: An unknown name, or an object that lacks part of the protocol.
    """
    if isinstance(policy, str):
        if policy in _OURS:
            return _OURS[policy]()
        for point in entry_points(group=GROUP):
            if point.name == policy:
                return resolve(point.load())
        known = ", ".join(available())
        raise OptionError(f"unknown policy {policy!r}", need=f"one of {known}", remedy="name one of these, or pass an object")
    made = policy() if isinstance(policy, type) else policy
    missing = [name for name in _PROTOCOL if _lacks(made, name)]
    if missing:
        remedy = "inherit from tierstore.policies.PolicyBase"
        have = f"without {', '.join(missing)}"
        raise OptionError(f"policy {made!r} does not have the policy protocol", need=", ".join(_PROTOCOL), have=have, remedy=remedy)
    return made


_PROTOCOL = ("bind", "accessed", "touched", "admitted", "removed", "victims", "next_use", "expected", "epoch")


def _lacks(policy: object, name: str) -> bool:
    """Looked up without running the policy's own code, which may fail."""
    try:
        getattr_static(policy, name)
    except AttributeError:
        return True
    return False
