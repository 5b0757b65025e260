"""The display of tiers and links draws on terminals and prints lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from tierstore.counters import LinkStats, Stats, TierStats
from tierstore.monitor.tui import TierDisplay

STATS = Stats(
    tiers={
        "gpu": TierStats(4_000_000, 3_000_000, 3_500_000, num_blocks=3, hits=9, misses=3, evictions=1234),
        "nvme": TierStats(80_000_000, 20_000_000, 20_000_000, num_blocks=9),
    },
    links={"h2d": LinkStats(bytes=5_000_000_000, transfers=777), "odd": LinkStats()},
    waits={},
    accesses=12,
    compactions=0,
    direct_io=True,
    page_locked_bytes=0,
    commits=1,
)


class Fake:
    def stats(self) -> Stats:
        return STATS


def test_a_terminal_gets_tables() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    with TierDisplay(Fake(), console=console, every_s=0.0) as display:
        assert display.update("step 1")
        assert display.update("step 2 [not markup]", force=True)
    drawn = output.getvalue()
    assert all(text in drawn for text in ("step 1", "3.00 MB", "4.00 MB", "3.50 MB", "75%", "1,234", "ram → gpu", "5.00 GB", "777"))


def test_a_file_gets_a_line_now_and_then() -> None:
    output = io.StringIO()
    with TierDisplay(Fake(), console=Console(file=output, width=40), plain_every_s=60) as display:
        assert display.update("step 1")
        assert not display.update("step 2")
        assert display.update("unused", plain="step [3]", force=True)
    lines = output.getvalue().splitlines()
    summary = "[gpu 3.00 MB of 4.00 MB, nvme 20.0 MB of 80.0 MB; h2d 5.00 GB, odd 0 B]"
    assert lines == [f"step 1  {summary}", f"step [3]  {summary}"]
