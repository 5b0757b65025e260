"""Every bad input is a specific error that says what was needed, what there was and what to do; and nothing has changed."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.quiet import assert_quiet, assert_same, values
from tierstore import AsyncTierStore, TierStore
from tierstore.catalog import FILLER_PREFIX
from tierstore.errors import (
    BlockExistsError,
    BlockNotFoundError,
    BusyError,
    CapacityError,
    ClosedError,
    DirectoryError,
    LeaseError,
    NoDirectoryError,
    OptionError,
    SizeError,
    TensorError,
    TierstoreError,
)

KIB = 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TierStore]:
    with TierStore(gpu="128KiB", ram="512KiB", nvme=tmp_path / "swap", device="cpu") as store:
        for number in range(12):  # some of them on each tier
            store.put(f"b{number}", {"w": torch.full((40, 50), float(number)), "n": torch.tensor(number)})
        with store.use("b11", write=True) as block:
            block["w"].add_(0.5)
        yield store


def refused(
    store: TierStore, kind: type[TierstoreError], call: Callable[[], object], *, need: bool = False, have: bool = False
) -> TierstoreError:
    """The call raises exactly this kind, says what to do, and leaves the store as it was."""
    before, described = values(store), [store.info(name) for name in store]
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert error.problem
    assert error.remedy
    assert error.problem in str(error)
    assert str(error.remedy) in str(error)
    assert error.need is not None or not need
    assert error.have is not None or not have
    assert_quiet(store)
    assert_same(before, values(store))
    assert [(info.name, info.dirty, info.hold, info.tensors) for info in map(store.info, store)] == [
        (info.name, info.dirty, info.hold, info.tensors) for info in described
    ]
    return error


# -- opening ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["7Gb", "-1", "7 bananas", "", "7..5GB", "1e9x", -1, 1.5, True, None, [], "101%", "0", 0, "4095"])
@pytest.mark.parametrize("option", ["gpu", "ram", "nvme_limit"])
def test_sizes_that_are_none(tmp_path: Path, size: object, option: str) -> None:
    if option == "nvme_limit" and size is None:
        pytest.skip("the default")
    options: dict[str, Any] = {"gpu": "1MB", "ram": "1MB", "nvme": tmp_path / "swap", option: size}
    with pytest.raises(SizeError) as caught:
        TierStore(**options, device="cpu")
    assert caught.value.need is not None
    assert caught.value.have is not None
    assert caught.value.remedy
    assert not (tmp_path / "swap").exists()


@pytest.mark.parametrize("option", ["gpu", "ram", "nvme_limit"])
def test_budgets_larger_than_the_hardware(tmp_path: Path, option: str) -> None:
    options: dict[str, Any] = {"gpu": "1MB", "ram": "1MB", "nvme": tmp_path / "swap", option: "900TB"}
    with pytest.raises(SizeError, match=option) as caught:
        TierStore(**options, device="cpu")
    assert caught.value.need_bytes == 900 * 10**12
    assert caught.value.have_bytes < 900 * 10**12
    assert caught.value.remedy
    assert not (tmp_path / "swap").exists()


def test_budgets_that_only_together_are_too_large() -> None:
    half = psutil.virtual_memory().total * 6 // 10
    with pytest.raises(SizeError):
        TierStore(gpu=half, ram=half, device="cpu")


@pytest.mark.parametrize("ram", [4096, 8192, 16384])
def test_ram_that_holds_transfer_space_only(tmp_path: Path, ram: int) -> None:
    with pytest.raises(SizeError, match="ram") as caught:
        TierStore(gpu="1MB", ram=ram, nvme=tmp_path / "swap", device="cpu")
    assert caught.value.need is not None
    assert caught.value.have is not None
    assert caught.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "mru"},
        {"policy": object()},
        {"policy": 5},
        {"device": "tpu"},
        {"device": "meta"},
        {"device": "cuda:99"},
        {"device": 3.5},
        {"page_locked": "yes"},
        {"direct_io": "yes"},
        {"direct_io": None},
        {"keep": 0},
        {"keep": -1},
        {"keep": "2"},
        {"keep": 1.5},
        {"generation": "last"},
        {"generation": 1.5},
        {"checksum": "md5"},
    ],
    ids=str,
)
def test_options_that_are_unknown(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        TierStore(**{"gpu": "1MB", "ram": "1MB", "nvme": tmp_path / "swap", "device": "cpu", **options})
    assert caught.value.need is not None
    assert str(caught.value)
    with TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu"):
        pass  # nothing was left locked


@pytest.mark.parametrize("options", [{"nvme_limit": "1GB"}, {"generation": 3}, {"keep": 2}], ids=str)
def test_options_that_need_a_directory(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        TierStore(gpu="1MB", ram="1MB", device="cpu", **options)
    assert "nvme=" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("nvme", [5, 3.5, b"bytes\0", "", "nul\0byte", ["a", "b"]], ids=repr)
def test_directories_that_are_no_path(nvme: Any) -> None:
    with pytest.raises((OptionError, DirectoryError)) as caught:
        TierStore(gpu="1MB", ram="1MB", nvme=nvme, device="cpu")
    assert caught.value.remedy


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for nvme in (path, path / "below"):
        with pytest.raises(DirectoryError) as caught:
            TierStore(gpu="1MB", ram="1MB", nvme=nvme, device="cpu")
        assert caught.value.remedy
    assert path.read_text() == "mine"


def test_a_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DirectoryError, match="thesis") as caught:
        TierStore(gpu="1MB", ram="1MB", nvme=tmp_path, device="cpu")
    assert caught.value.remedy
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work otherwise there")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    path = Path("/proc/self/tierstore") if hasattr(os, "geteuid") and os.geteuid() == 0 else tmp_path / "locked" / "swap"
    if not str(path).startswith("/proc"):
        path.parent.mkdir(mode=0o500)
    with pytest.raises(DirectoryError) as caught:
        TierStore(gpu="1MB", ram="1MB", nvme=path, device="cpu")
    assert caught.value.remedy


def test_a_directory_in_use(tmp_path: Path) -> None:
    with TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
        store.put("a", torch.ones(3))
        with pytest.raises(BusyError, match=str(os.getpid())) as caught:
            TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu")
        assert caught.value.pid == os.getpid()
        assert caught.value.remedy
        code = "import sys; from tierstore import TierStore; TierStore(gpu='1MB', ram='1MB', nvme=sys.argv[1], device='cpu')"
        root = Path(__file__).parents[1]
        child = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "swap")], capture_output=True, text=True, cwd=root, timeout=60, check=False
        )
        assert "BusyError" in child.stderr
        assert str(os.getpid()) in child.stderr
        assert store.commit() == 1


def test_a_generation_that_is_not_there(tmp_path: Path) -> None:
    with TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
        store.commit()
    for generation in (7, 0, -1):
        with pytest.raises(DirectoryError) as caught:
            TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu", generation=generation)
        assert caught.value.remedy
        assert "1" in str(caught.value)


# -- names ------------------------------------------------------------------------------------------------------------------


def test_names_that_nobody_has(store: TierStore) -> None:
    calls: list[Callable[[Any], object]] = [
        store.read,
        store.info,
        store.evict,
        store.delete,
        store.unhold,
        store.prefetch,
        lambda name: store.hold(name, "ram"),
        lambda name: store.write(name, torch.ones(2)),
        lambda name: store.use(name).__enter__(),
        lambda name: store.use("b1", name, write=True).__enter__(),
        lambda name: store.prefetch("b1", name),
    ]
    unknown: list[Any] = ["nobody", "", "B1", None, 5, [], ("b1",)]
    for name in unknown:
        for call in calls:
            error = refused(store, BlockNotFoundError, lambda call=call, name=name: call(name), have=True)  # type: ignore[misc]
            assert isinstance(error, KeyError)
            assert error.block == name


def test_names_that_are_taken(store: TierStore) -> None:
    for tier in ("gpu", "ram", "nvme"):
        error = refused(store, BlockExistsError, lambda tier=tier: store.put("b3", torch.ones(1), tier=tier))  # type: ignore[misc]
        assert error.block == "b3"


@pytest.mark.parametrize("name", ["", None, 5, b"bytes", [], "\ud800"], ids=repr)
def test_names_that_no_block_can_have(store: TierStore, name: Any) -> None:
    refused(store, TensorError, lambda: store.put(name, torch.ones(1)))
    refused(store, TensorError, lambda: store.put(name, {"a": torch.ones(1)}))
    if name != []:
        refused(store, TensorError, lambda: store.put("new", {name: torch.ones(1)}))
        refused(store, TensorError, lambda: store.put("new", {"good": torch.ones(1), name: torch.ones(1)}))


def test_names_the_file_format_reserves(store: TierStore) -> None:
    for name in ("__metadata__", FILLER_PREFIX + "0"):
        refused(store, TensorError, lambda name=name: store.put("new", {name: torch.ones(1)}))  # type: ignore[misc]


def test_tiers_that_are_unknown(store: TierStore) -> None:
    unknown: list[Any] = ["cpu", "GPU", "", None, 1, []]
    for tier in unknown:
        error = refused(store, OptionError, lambda tier=tier: store.put("new", torch.ones(1), tier=tier), need=True)  # type: ignore[misc]
        assert "'gpu', 'ram' or 'nvme'" in str(error)
        refused(store, OptionError, lambda tier=tier: store.hold("b1", tier), need=True)  # type: ignore[misc]


# -- tensors ----------------------------------------------------------------------------------------------------------------


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


BAD_TENSORS: dict[str, Callable[[], Any]] = {
    "complex": lambda: torch.ones(2, dtype=torch.complex128),
    "pair without a dimension": lambda: torch.zeros((1,), dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(()),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.ones(3, device="meta"),
    "quantised": quantised,
    "list": lambda: [1.0, 2.0],
    "array": lambda: np.ones(3),
    "none": lambda: None,
    "number": lambda: 5,
    "mapping inside": lambda: {"a": torch.ones(1)},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize", "ignore:.*quant.*")
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_that_cannot_be_stored(store: TierStore, kind: str) -> None:
    bad = BAD_TENSORS[kind]()
    for tier in ("gpu", "ram", "nvme"):
        error = refused(store, TensorError, lambda tier=tier: store.put("new", {"good": torch.ones(2), "bad": bad}, tier=tier))  # type: ignore[misc]
        assert error.block == "new"
        assert error.tensor == "bad"
    refused(store, TensorError, lambda: store.write("b2", {"w": torch.zeros(40, 50), "n": bad}))
    if kind != "mapping inside":
        refused(store, TensorError, lambda: store.put("new", bad))
        refused(store, TensorError, lambda: store.write("b2", bad))


def test_blocks_without_tensors(store: TierStore) -> None:
    refused(store, TensorError, lambda: store.put("new", {}))
    refused(store, TensorError, lambda: store.write("b1", {}))


@pytest.mark.parametrize("where", ["gpu", "ram", "nvme"])
def test_writes_that_do_not_fit_the_block(store: TierStore, where: str) -> None:
    store.put("target", {"w": torch.ones(3, 4), "n": torch.tensor(1)}, tier=where)
    store.put("lone", torch.ones(3), tier=where)
    for bad in (torch.ones(4, 3), torch.ones(12), torch.ones(3, 4, dtype=torch.float64), torch.ones(1, 4), torch.tensor(1.0)):
        error = refused(store, TensorError, lambda bad=bad: store.write("target", {"n": torch.tensor(9), "w": bad}), need=True, have=True)  # type: ignore[misc]
        assert error.tensor == "w"
    refused(store, TensorError, lambda: store.write("target", {"other": torch.ones(3, 4), "w": torch.zeros(3, 4)}), have=True)
    refused(store, TensorError, lambda: store.write("target", torch.ones(3, 4)))
    refused(store, TensorError, lambda: store.write("lone", torch.ones(4)), need=True, have=True)
    refused(store, TensorError, lambda: store.write("lone", {"other": torch.ones(3)}))
    store.write("target", {"n": torch.tensor(5)})
    target = store.read("target")
    assert isinstance(target, dict)
    assert torch.equal(target["w"], torch.ones(3, 4))
    assert target["n"] == 5


def test_blocks_larger_than_a_tier(store: TierStore) -> None:
    for nbytes in (129 * KIB, 600 * KIB, 10**9):
        for tier in ("gpu", "ram", "nvme"):
            big = torch.empty(nbytes, dtype=torch.uint8)
            error = refused(store, CapacityError, lambda big=big, tier=tier: store.put("big", big, tier=tier), need=True, have=True)  # type: ignore[misc]
            assert error.block == "big"
            assert error.tier in ("gpu", "ram")
    assert "big" not in store


# -- leases and calls ---------------------------------------------------------------------------------------------------------


def test_more_than_the_device_can_ever_hold(store: TierStore) -> None:
    names = [f"b{number}" for number in range(12)]
    error = refused(store, CapacityError, lambda: store.use(*names).__enter__(), need=True, have=True)
    assert error.tier == "gpu"
    assert "gpu=" in str(error.remedy)
    with store.use(*names[:10]):
        for _ in range(3):
            with pytest.raises(CapacityError) as caught:
                store.use(*names[10:]).__enter__()
            assert caught.value.need is not None
            assert caught.value.have is not None
            with pytest.raises(CapacityError):
                store.put("one more", torch.empty(60 * KIB, dtype=torch.uint8), tier="gpu")
            with pytest.raises(CapacityError):
                store.hold("b11", "gpu")
        assert "one more" not in store
        assert store.info("b11").hold is None
    assert_quiet(store)


def test_calls_inside_ones_own_lease_that_would_never_end(store: TierStore) -> None:
    value = {"n": torch.tensor(3)}
    inside: list[Callable[[], object]] = [
        lambda: store.evict("b1"),
        lambda: store.delete("b1"),
        lambda: store.write("b1", value),
        lambda: store.hold("b1", "nvme"),
    ]
    inside_writing: list[Callable[[], object]] = [store.commit, store.flush, lambda: store.commit(wait=False)]
    for write in (False, True):
        with store.use("b1", write=write):
            for call in [*inside, *(inside_writing if write else [])]:
                with pytest.raises(LeaseError) as caught:
                    call()
                assert type(caught.value) is LeaseError
                assert caught.value.remedy
        assert_quiet(store)
    with store.use("b1"):
        store.read("b1")
        store.flush()
        store.commit()
        store.write("b2", value)
        store.evict("b3")


@pytest.mark.parametrize("write", [5, None, 1.0, object(), [["b1"]], [5]], ids=repr)
def test_write_that_names_nothing(store: TierStore, write: Any) -> None:
    refused(store, LeaseError, lambda: store.use("b1", write=write).__enter__())


@pytest.mark.parametrize("timeout", ["5", float("nan"), object()], ids=repr)
def test_timeouts_that_are_no_number(store: TierStore, timeout: Any) -> None:
    refused(store, OptionError, lambda: store.use("b1", timeout=timeout).__enter__())


@pytest.mark.parametrize("metadata", [object(), {1, 2}, float("nan"), {"a": torch.ones(1)}, {(1, 2): 3}, b"x"], ids=repr)
def test_metadata_that_is_not_json(store: TierStore, metadata: Any) -> None:
    for wait in (True, False):
        refused(store, OptionError, lambda wait=wait: store.commit(metadata, wait=wait))  # type: ignore[misc]
    assert store.committed is None


def test_metadata_that_contains_itself(store: TierStore) -> None:
    endless: list[Any] = []
    endless.append(endless)
    refused(store, OptionError, lambda: store.commit(endless))


def test_holds_that_leave_no_room(store: TierStore) -> None:
    held = []
    with pytest.raises(CapacityError) as caught:
        for name in list(store):
            store.hold(name, "gpu")
            held.append(name)
    assert caught.value.need is not None
    assert len(held) >= 8
    assert store.info(list(store)[len(held)]).hold is None
    refused(store, LeaseError, lambda: store.evict(held[0]))
    for name in held:
        store.unhold(name)
        store.unhold(name)


def test_two_tiers_have_no_drive() -> None:
    with TierStore(gpu="128KiB", ram="512KiB", device="cpu") as store:
        store.put("a", torch.ones(3))
        calls: list[Callable[[], object]] = [
            store.commit,
            lambda: store.commit(wait=False),
            lambda: store.put("b", torch.ones(1), tier="nvme"),
            lambda: store.hold("a", "nvme"),
        ]
        for call in calls:
            refused(store, NoDirectoryError, call)
        store.evict("a")
        store.flush()
        assert store.committed is None
        assert "b" not in store


def test_two_tiers_are_full_at_once() -> None:
    """Everything has its home in RAM there: what does not fit fails, also beside a lease of one's own."""
    with TierStore(gpu="64KiB", ram="128KiB", device="cpu") as store:
        names = []
        for number in range(64):
            try:
                store.put(str(number), torch.full((1024,), float(number)))
            except CapacityError as error:
                assert error.need is not None  # noqa: PT017
                assert error.remedy  # noqa: PT017
                break
            names.append(str(number))
        assert 20 <= len(names) < 32
        for tier in ("ram", "gpu"):
            with store.use("0"), pytest.raises(CapacityError):
                store.put("more", torch.ones(1024), tier=tier)
            refused(store, CapacityError, lambda tier=tier: store.put("more", torch.ones(1024), tier=tier))  # type: ignore[misc]
        store.delete("3")
        store.put("more", torch.ones(1024), tier="gpu")


# -- after the end -----------------------------------------------------------------------------------------------------------


def public(kind: type) -> set[str]:
    return {name for name, value in inspect.getmembers(kind) if not name.startswith("_") and name not in ("close", "engine")} | {
        "__len__",
        "__iter__",
        "__contains__",
    }


def test_use_after_close(tmp_path: Path) -> None:
    store = TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu")
    store.put("a", torch.ones(3))
    entered_late = store.use("a")
    trace = store.trace
    store.close()
    store.close()
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("b", torch.ones(1)),
        "use": lambda: store.use("a"),
        "prefetch": lambda: store.prefetch("a"),
        "read": lambda: store.read("a"),
        "write": lambda: store.write("a", torch.ones(3)),
        "hold": lambda: store.hold("a", "ram"),
        "unhold": lambda: store.unhold("a"),
        "evict": lambda: store.evict("a"),
        "delete": lambda: store.delete("a"),
        "commit": store.commit,
        "flush": store.flush,
        "adopt": lambda: store.adopt(tmp_path),
        "info": lambda: store.info("a"),
        "stats": store.stats,
        "trace": lambda: store.trace,
        "timeline": lambda: store.timeline,
        "committed": lambda: store.committed,
        "device": lambda: store.device,
        "__len__": lambda: len(store),
        "__iter__": lambda: iter(store),
        "__contains__": lambda: "a" in store,
    }
    assert calls.keys() == public(TierStore)
    for name, call in calls.items():
        with pytest.raises(ClosedError) as caught:
            call()
        assert caught.value.remedy, name
    with pytest.raises(ClosedError):
        entered_late.__enter__()
    assert list(trace) == []


def test_use_after_close_on_the_async_face(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = AsyncTierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu")
        tries: list[tuple[str, Callable[[], Any]]] = [
            ("put", lambda: store.put("b", torch.ones(1))),
            ("use", lambda: store.use("a").__aenter__()),
            ("prefetch", lambda: store.prefetch("a")),
            ("read", lambda: store.read("a")),
            ("write", lambda: store.write("a", torch.ones(3))),
            ("hold", lambda: store.hold("a", "ram")),
            ("unhold", lambda: store.unhold("a")),
            ("evict", lambda: store.evict("a")),
            ("delete", lambda: store.delete("a")),
            ("commit", store.commit),
            ("flush", store.flush),
            ("adopt", lambda: store.adopt(tmp_path)),
        ]
        others = {"info", "stats", "trace", "timeline", "committed", "device", "__len__", "__iter__", "__contains__"}
        assert {name for name, _ in tries} == public(AsyncTierStore) - others
        for name, call in tries:  # not entered yet
            with pytest.raises(ClosedError) as caught:
                await call()
            assert caught.value.remedy, name
        async with store:
            await store.put("a", torch.ones(3))
        await store.close()
        for name, call in tries:
            with pytest.raises(ClosedError) as caught:
                await call()
            assert caught.value.remedy, name

    asyncio.run(scenario())


def test_closing_ends_those_who_wait(tmp_path: Path) -> None:
    store = TierStore(gpu="64KiB", ram="1MB", nvme=tmp_path / "swap", device="cpu")
    store.put("a", torch.ones(3))
    ended: list[type] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except TierstoreError as error:
            ended.append(type(error))

    calls: list[Callable[[], object]] = [
        lambda: store.use("a").__enter__(),
        lambda: store.read("a"),
        lambda: store.write("a", torch.zeros(3)),
        lambda: store.delete("a"),
        store.commit,
        lambda: store.evict("a"),
    ]
    with store.use("a", write=True) as a:
        threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        while len(store.engine.scheduler.waiting) < len(calls):
            threading.Event().wait(0.001)
        store.close()
        for thread in threads:
            thread.join(10)
        a.add_(1)  # still memory
    assert ended == [ClosedError] * len(calls)


@pytest.mark.parametrize("attempt", range(5))
def test_closing_from_several_threads_in_the_middle_of_everything(tmp_path: Path, attempt: int) -> None:
    store = TierStore(gpu="64KiB", ram="256KiB", nvme=tmp_path / "swap", device="cpu")
    for number in range(8):
        store.put(str(number), torch.ones(4000))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(10**6):
                name = str((seed + step) % 8)
                with store.use(name, write=True) as block:
                    block.add_(1)
                store.read(name)
                store.put(f"{seed} {step}", torch.ones(10))
                store.delete(f"{seed} {step}")
                store.commit(wait=bool(step % 2))
        except ClosedError:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.05 + 0.03 * attempt)
    closers = [threading.Thread(target=store.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in [*closers, *threads]:
        thread.join(20)
        assert not thread.is_alive()
    assert not failures
    with TierStore(gpu="64KiB", ram="256KiB", nvme=tmp_path / "swap", device="cpu") as again:
        values(again)
        assert_quiet(again)
