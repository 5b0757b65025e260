"""What people do with a store, as scripts for a `Driver`: together every call, on every tier, with far more data than room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.faults.driver import Driver

GPU, RAM = 6, 9
"""Pages of the memory tiers."""


def fill(driver: Driver, num_blocks: int = 8) -> list[str]:
    """Blocks of two pages, begun on all tiers."""
    names = [f"b{number}" for number in range(num_blocks)]
    for number, name in enumerate(names):
        driver.put(name, tier=("ram", "gpu", "nvme")[number % 3])
    return names


def puts(driver: Driver) -> None:
    fill(driver, 10)
    driver.put("large", 4, "gpu")
    driver.put("larger", 5, "nvme")
    driver.commit()


def training(driver: Driver) -> None:
    names = fill(driver)
    for _ in range(3):
        for name in [*names, *reversed(names)]:
            driver.use(name, write=[name])
        driver.commit()


def reading(driver: Driver) -> None:
    names = fill(driver)
    driver.commit()
    for _ in range(4):
        for name in names:
            driver.use(name)


def together(driver: Driver) -> None:
    names = fill(driver)
    for left, right in zip(names, names[1:] + names[:1], strict=True):
        driver.use(left, right, write=[left])
    for left, middle, right in zip(names, names[3:], names[5:], strict=False):
        driver.use(left, middle, right, write=[left, right])
    driver.flush()


def by_hand(driver: Driver) -> None:
    names = fill(driver, 6)
    for name in names:
        driver.use(name, write=[name])
        driver.evict(name)
    for name in names:
        driver.prefetch(name)
        driver.write(name)
        driver.read(name)
    driver.hold("b0", "gpu")
    driver.hold("b1", "ram")
    driver.hold("b2", "nvme")
    for name in names:
        driver.use(name, write=[name])
        driver.write(name)
        driver.read(name)
    driver.unhold("b0")
    driver.unhold("b2")
    driver.hold("b0", "nvme")
    driver.hold("b2", "ram")
    driver.flush()
    for name in names[3:]:
        driver.prefetch(name)
        driver.delete(name)
        driver.put(name, 3, "nvme")
    for name in names[3:]:
        driver.use(name)


def commits(driver: Driver) -> None:
    names = fill(driver, 6)
    driver.commit()

    def write_all() -> None:
        for name in names:
            driver.use(name, write=[name])

    for _ in range(3):
        write_all()
        driver.commit(meanwhile=write_all)
    driver.delete("b1")
    driver.write("b2")
    driver.commit()
    for name in ("b0", "b3"):
        driver.use(name, write=[name])
        driver.evict(name)
        driver.write(name)
    driver.commit(meanwhile=partial(driver.delete, "b4"))


def scattered(driver: Driver) -> None:
    """Blocks of several sizes, so that extents have to be moved together."""
    sizes = {f"s{number}": 1 + number % 3 for number in range(10)}
    for name, num_pages in sizes.items():
        driver.put(name, num_pages)
    for turn in range(6):
        for name in list(sizes)[turn % 3 :: 2]:
            driver.use(name, write=[name] if turn % 2 else [])
        large = "s2" if turn % 2 else "s5"
        driver.use(large, f"s{turn}", write=[large])


WORKLOADS: dict[str, Callable[[Driver], None]] = {
    work.__name__: work for work in (puts, training, reading, together, by_hand, commits, scattered)
}
