"""The display around any loop: what it shows, that it ends with the loop however that ends, and that it stops nothing."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.training.slow import MS, SlowStore, opened
from tierstore import TierStore
from tierstore.errors import OptionError, TensorError
from tierstore.training.progress import Progress, _Values, first_dimension, progress

MB = 1 << 20


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowStore]:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB, nvme=False) as slow:
        slow.put(2, 64 << 10)
        yield slow


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=60, color_system=None)


def drawn(console: Console) -> str:
    """All that was drawn, one redraw below the other."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"(\r|\x1b\[[0-9;?]*[A-Za-z])+", "\n", console.file.getvalue())


def pipe() -> Console:
    return Console(file=io.StringIO(), width=40)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def is_open(console: Console) -> bool:
    """Whether the cursor is hidden, as it is while something is drawn live."""
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    return text.rfind("\x1b[?25l") > text.rfind("\x1b[?25h")


def test_a_terminal_shows_all_that_a_loop_does(slow: SlowStore) -> None:
    console = terminal(80)

    def loader() -> Iterator[int]:
        for step in range(4):
            slow.clock.advance(50 * MS)
            yield step

    for step in (bar := progress(slow.store, loader(), total=4, tokens=8192, console=console)):
        slow.use("b0", write=True)
        slow.clock.advance(50 * MS)
        bar.update(loss=torch.tensor(2.0 / (step + 1)), lr=3e-4)
    text = drawn(console)
    for shown in ("step 4/4", "loss 0.5000", "lr 0.0003", "81,920 tokens/s", "100 ms/step", "ram → gpu", "data loader", "computing", "50%"):
        assert shown in text, text
    assert "waiting for a batch; cause: the data loader" in re.sub(r"\s+", " ", text)
    assert max(len(line) for line in text.splitlines() if not line.startswith("step 3 took")) <= 80
    assert not is_open(console)


def test_a_pipe_gets_a_line_now_and_then(slow: SlowStore) -> None:
    console = pipe()
    batches = [(torch.zeros(6, 3), torch.zeros(6)) for _ in range(10)]
    for number, _ in enumerate(bar := progress(slow.store, batches, console=console, plain_every_s=4.0)):
        slow.use("b0")
        slow.clock.advance(1000 * MS)
        bar.update(loss=float(number))
    shown = lines(console)
    assert [line.split("  ")[0] for line in shown] == ["step 1/10", "step 3/10", "step 7/10", "step 10/10"], "3 has a diagnosis"
    assert "loss 9.000  6.000 samples/s  1.00 s/step  waits: none  [gpu " in shown[-1]
    assert "7.00 s left" in shown[1]
    assert "h2d 0 B/s" in shown[-1]


@pytest.mark.parametrize("total", [3, None])
def test_a_pipe_gets_the_last_step_once(slow: SlowStore, total: int | None) -> None:
    """Where steps take longer than `plain_every_s` each has a line, and the end has nothing to add to that of the last."""
    console = pipe()
    for number in (bar := progress(slow.store, iter(range(3)), total=total, console=console, plain_every_s=4.0)):
        slow.use("b0")
        slow.clock.advance(5000 * MS)
        bar.update(loss=float(number))
    of = "" if total is None else "/3"
    shown = lines(console)
    assert [line.split("  ")[0] for line in shown] == [f"step {step}{of}" for step in (1, 2, 3)]
    assert "loss 2.000" in shown[-1]


def test_a_pipe_gets_the_last_step_of_each_loop(slow: SlowStore) -> None:
    console = pipe()
    bar = progress(slow.store, range(1), console=console, plain_every_s=4.0)
    for _ in range(2):
        for _ in bar:
            slow.clock.advance(1000 * MS)
    assert [line.split("  ")[0] for line in lines(console)] == ["step 1/1", "step 1/1"], "both loops ended, with the same words"


def test_a_loop_that_goes_on_counts_from_where_it_was(slow: SlowStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tierstore")
    console = pipe()
    for _ in progress(slow.store, range(4), first=10, console=console, plain_every_s=0.5):
        slow.clock.advance(1000 * MS)
    assert [line.split("  ")[0] for line in lines(console)] == ["step 11/14", "step 12/14", "step 13/14", "step 14/14"]
    assert "3.00 s left" in lines(console)[0]
    assert [record.getMessage().split(" took")[0] for record in caplog.records] == ["step 13"], "the third, as ever"


def test_it_redraws_four_times_a_second_at_most(slow: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []
    real = TierStore.stats
    monkeypatch.setattr(TierStore, "stats", lambda store: (looks.append(None), real(store))[1])
    for _ in progress(slow.store, range(1000), console=terminal()):
        slow.clock.advance(MS)
    assert 3 <= len(looks) <= 7, "one at first, three later, one for the third step, one at the end"


@pytest.mark.parametrize("kind", [terminal, pipe])
def test_break_and_exceptions_close_it(slow: SlowStore, kind: Callable[[], Console]) -> None:
    console = kind()
    threads = threading.active_count()
    bar = progress(slow.store, range(100), console=console)
    for step in bar:
        if step == 5:
            break
    assert not is_open(console)
    with pytest.raises(KeyError, match="the loop's own"):
        for step in bar:
            if step == 5:
                raise KeyError("the loop's own")
    assert not is_open(console)
    assert threading.active_count() == threads
    assert len(list(bar)) == 100, "it can be used again"
    assert not is_open(console)
    assert bar.num_steps == 110


def test_what_the_loader_raises_comes_through(slow: SlowStore) -> None:
    def loader() -> Iterator[int]:
        yield 1
        raise OSError("no more data")

    console = terminal()
    with pytest.raises(OSError, match="no more data"):
        for _ in progress(slow.store, loader(), console=console):
            pass
    assert not is_open(console)


def test_a_store_that_is_closed_in_the_loop_ends_the_display_and_not_the_loop(slow: SlowStore) -> None:
    console = terminal()
    seen = []
    for step in progress(slow.store, range(6), console=console):
        seen.append(step)
        if step == 3:
            slow.store.close()
    assert seen == list(range(6))
    assert not is_open(console)


def test_a_loop_inside_a_loop_takes_the_terminal_and_gives_it_back(slow: SlowStore) -> None:
    outside, inside = terminal(), terminal()
    for epoch in (outer := progress(slow.store, range(8), console=outside, every_s=0)):
        slow.clock.advance(10 * MS)
        if epoch == 6:  # an evaluation
            assert is_open(outside)
            for _ in progress(slow.store, range(5), console=inside, every_s=0):
                assert is_open(inside)
                assert not is_open(outside)
                slow.clock.advance(100 * MS)
            assert not is_open(inside)
            assert is_open(outside)
    assert "step 5/5" in drawn(inside)
    assert "step 8/8" in drawn(outside)
    assert not is_open(outside)
    assert outer.diagnosis is not None
    assert outer.diagnosis.cause == "computing", "a step that held another loop is not called slow"


def test_one_progress_is_not_iterated_twice_at_once(slow: SlowStore) -> None:
    bar = progress(slow.store, range(3), show=False)
    for _ in bar:
        with pytest.raises(OptionError, match="one for each loop"):
            next(iter(bar))
    assert list(bar) == [0, 1, 2]


def test_what_is_abandoned_is_closed(slow: SlowStore) -> None:
    console = terminal()
    iterator = iter(progress(slow.store, range(10), console=console))
    next(iterator)
    assert is_open(console)
    del iterator
    assert not is_open(console)


def test_any_loader_will_do(slow: SlowStore) -> None:
    class Unsized:
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

        def __len__(self) -> int:
            raise TypeError("an iterable dataset has no length")

    for loader in (Unsized(), iter([1, 2, 3]), torch.utils.data.DataLoader(torch.arange(3.0), batch_size=1)):
        console = pipe()
        assert len(list(progress(slow.store, loader, console=console))) == 3
        assert lines(console)[-1].startswith("step 3")


def test_batches_are_let_go_before_the_next_is_made(slow: SlowStore) -> None:
    import weakref  # noqa: PLC0415

    class Batch:
        pass

    kept: list[weakref.ref[Batch]] = []

    def loader() -> Iterator[Batch]:
        for _ in range(4):
            assert not kept or kept[-1]() is None, "two batches at once"
            batch = Batch()
            kept.append(weakref.ref(batch))
            yield batch
            del batch

    for batch in progress(slow.store, loader(), show=False):
        del batch


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(7, 2), 7),
        ((torch.zeros(7, 2), torch.zeros(7)), 7),
        ([torch.zeros(7, 2), {"mask": torch.zeros(7)}], 7),
        ({"ids": torch.zeros(7, 2), "scale": torch.zeros(())}, 7),
        ((torch.zeros(7, 2), torch.zeros(5)), None),
        (torch.zeros(()), None),
        ("text", None),
        (3, None),
        ([], None),
    ],
)
def test_samples_are_counted_where_they_are_obvious(batch: object, samples: int | None) -> None:
    assert first_dimension(batch) == samples


def test_tokens_by_a_function_and_steps_where_nothing_can_be_counted(slow: SlowStore) -> None:
    for tokens, shown in ((lambda batch: 10 * batch, "20.00 tokens/s"), (None, "1.000 steps/s")):
        console = pipe()
        for _ in progress(slow.store, [1, 2, 3], tokens=tokens, console=console):
            slow.clock.advance(1000 * MS)
        assert shown in lines(console)[-1]


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"tokens": "many"}, {"accumulate": 0}, {"accumulate": 1.5}, {"total": -1}, {"first": -1}]
)
def test_senseless_options_are_refused(slow: SlowStore, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        progress(slow.store, range(3), **options)


def test_only_numbers_are_shown(slow: SlowStore) -> None:
    bar: Progress[int] = progress(slow.store, range(3), show=False)
    with pytest.raises(TensorError, match="mean"):
        bar.update(loss=torch.zeros(3))
    with pytest.raises(ValueError, match="could not convert"):
        bar.update(loss="low")  # type: ignore[arg-type]
    bar.update(loss=torch.ones(1, requires_grad=True).sum())


@pytest.mark.cuda
def test_a_loss_on_the_device_is_read_without_waiting_for_it(device: str) -> None:
    if device == "cpu":
        pytest.skip("there is nothing to wait for")
    (torch.zeros((), device=device) + 1).item()  # a kernel's first use stops everything, to load it
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    values = _Values()
    values.note("loss", torch.full((), 1.0, device=device))
    torch.cuda.synchronize()
    values.note("loss", torch.full((), 2.0, device=device))
    torch.cuda.synchronize()
    assert values.read() == {"loss": 2.0}
    late = torch.full((), 3.0, device=device)
    values.note("loss", late)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # the rest of the step
    behind = torch.cuda.Event()
    behind.record()
    later = late + 1
    values.note("loss", later)
    assert values.read() == {"loss": 3.0}, "the newest that is ready"
    assert not behind.query(), "reading it has waited for the step"
    assert values.read() == {"loss": 3.0}
    assert values.read(wait=True) == {"loss": 4.0}
    assert behind.query()
