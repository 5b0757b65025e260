"""Budgets, devices, control groups, and the word of warning when torch cannot use the GPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierstore import hardware
from tierstore.errors import OptionError, SizeError
from tierstore.hardware import Budgets, Hardware, measure_hardware, resolve_budgets, resolve_device

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
GIB = 2**30

LAPTOP = Hardware(
    cpu_count=16,
    ram_total_bytes=64 * GIB,
    ram_available_bytes=56 * GIB,
    gpu_name="a laptop GPU",
    gpu_total_bytes=8 * GIB,
    gpu_free_bytes=7 * GIB,
    disk_total_bytes=1000 * 10**9,
    disk_free_bytes=400 * 10**9,
)


# -- budgets ------------------------------------------------------------------------------------------------------------


def test_sizes_as_given() -> None:
    budgets = resolve_budgets("7GB", "48GB", "200GB", device=CUDA, hardware=LAPTOP)
    assert budgets == Budgets(7 * 10**9 // 4096 * 4096, 48 * 10**9 // 4096 * 4096, 200 * 10**9 // 4096 * 4096)


def test_shares_are_of_the_whole() -> None:
    budgets = resolve_budgets("50%", "75%", "10%", device=CUDA, hardware=LAPTOP)
    assert budgets == Budgets(4 * GIB, 48 * GIB, 100 * 10**9 // 4096 * 4096)


def test_auto_leaves_headroom() -> None:
    budgets = resolve_budgets(device=CUDA, hardware=LAPTOP)
    assert budgets.gpu_bytes == pytest.approx(7 * GIB * 0.75, abs=4096)
    assert budgets.ram_bytes == pytest.approx(56 * GIB * 0.6, abs=4096)
    assert budgets.nvme_limit_bytes == pytest.approx(400e9 * 0.95, abs=4096)

    small = resolve_budgets(device=CUDA, hardware=replace(LAPTOP, gpu_free_bytes=2 * GIB))
    assert small.gpu_bytes == 1 * GIB  # never less than 1 GiB free


def test_auto_on_a_cpu_shares_one_memory() -> None:
    budgets = resolve_budgets(device=CPU, hardware=LAPTOP)
    assert budgets.gpu_bytes == 2 * GIB
    assert budgets.ram_bytes == pytest.approx(54 * GIB * 0.6, abs=4096)

    budgets = resolve_budgets(ram="48GiB", device=CPU, hardware=LAPTOP)
    assert budgets.gpu_bytes == 1 * GIB  # an eighth of what the RAM tier leaves

    budgets = resolve_budgets(gpu="20GiB", device=CPU, hardware=LAPTOP)
    assert budgets.ram_bytes == pytest.approx(36 * GIB * 0.6, abs=4096)


def test_no_directory_no_limit() -> None:
    without = replace(LAPTOP, disk_total_bytes=None, disk_free_bytes=None)
    assert resolve_budgets("1GB", "1GB", device=CPU, hardware=without).nvme_limit_bytes is None
    with pytest.raises(OptionError, match="without nvme="):
        resolve_budgets("1GB", "1GB", "1GB", device=CPU, hardware=without)


def test_what_the_store_holds_counts_as_free() -> None:
    full = replace(LAPTOP, disk_free_bytes=0)
    assert resolve_budgets(device=CPU, hardware=full, nvme_held_bytes=100 * 10**9).nvme_limit_bytes == pytest.approx(95e9, abs=4096)
    assert resolve_budgets(device=CPU, hardware=full).nvme_limit_bytes == 0


def test_a_limit_above_what_is_free_is_said(caplog: pytest.LogCaptureFixture) -> None:
    budgets = resolve_budgets("1GB", "1GB", "900GB", device=CPU, hardware=LAPTOP)
    assert budgets.nvme_limit_bytes == 900 * 10**9 // 4096 * 4096
    assert "only 400 GB are free" in caplog.text


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        ({"gpu": "9GB"}, CUDA, "gpu='9GB' is larger than this machine"),
        ({"gpu": "7.9GiB"}, CUDA, "gpu='7.9GiB' is more than is free now"),
        ({"ram": "65GiB"}, CUDA, "ram='65GiB' is larger than this machine"),
        ({"ram": "60GiB"}, CUDA, "ram='60GiB' is more than is free now"),
        ({"ram": "100%"}, CUDA, "ram='100%' is more than is free now"),
        ({"gpu": "65GiB"}, CPU, "gpu='65GiB' is larger than this machine"),
        ({"gpu": "30GiB", "ram": "30GiB"}, CPU, "ram='30GiB' is more than is free now"),
        ({"gpu": "40GiB", "ram": "40GiB"}, CPU, "ram='40GiB' is larger than this machine"),
        ({"nvme_limit": "1001GB"}, CPU, "nvme_limit='1001GB' is larger than this machine"),
        ({"gpu": 4095}, CPU, "gpu=4095 is too small"),
        ({"ram": 0}, CPU, "ram=0 is too small"),
        ({"ram": "1e9"}, CPU, "ram= '1e9' is not a size"),
        ({"gpu": "7Gb"}, CPU, "bits"),
    ],
)
def test_refused(options: dict[str, Any], device: torch.device, message: str) -> None:
    with pytest.raises(SizeError) as caught:
        resolve_budgets(**{"gpu": "1GB", "ram": "1GB"} | options, device=device, hardware=LAPTOP)
    error = caught.value
    assert message in str(error)
    assert error.need
    assert error.have
    assert error.remedy


def test_auto_with_nothing_free() -> None:
    for starved in (replace(LAPTOP, gpu_free_bytes=GIB // 2), replace(LAPTOP, ram_available_bytes=0)):
        with pytest.raises(SizeError, match="too little memory"):
            resolve_budgets(device=CUDA, hardware=starved)


def test_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tierstore")
    resolve_budgets("7GB", "auto", device=CUDA, hardware=LAPTOP)
    assert len(caplog.records) == 1
    assert f"gpu {7 * 10**9 // 4096 * 4096} bytes (7.00 GB, from '7GB')" in caplog.text
    assert "from 'auto'" in caplog.text


sizes = st.just("auto") | st.integers(0, 2**37) | st.integers(0, 100).map("{}%".format)


@given(gpu=sizes, ram=sizes, free=st.integers(0, 64 * GIB), gpu_free=st.integers(0, 8 * GIB), on_cpu=st.booleans())
def test_never_more_than_there_is(gpu: int | str, ram: int | str, free: int, gpu_free: int, on_cpu: bool) -> None:
    machine = replace(LAPTOP, ram_available_bytes=free, gpu_free_bytes=gpu_free)
    try:
        budgets = resolve_budgets(gpu, ram, device=CPU if on_cpu else CUDA, hardware=machine)
    except SizeError:
        return  # refused: nothing to check
    assert budgets.gpu_bytes % 4096 == budgets.ram_bytes % 4096 == 0
    assert min(budgets.gpu_bytes, budgets.ram_bytes) >= 4096
    if on_cpu:
        assert budgets.gpu_bytes + budgets.ram_bytes <= free
    else:
        assert budgets.ram_bytes <= free
        assert budgets.gpu_bytes <= gpu_free
    for asked, got in ((gpu, budgets.gpu_bytes), (ram, budgets.ram_bytes)):
        if isinstance(asked, int):
            assert asked - 4096 < got <= asked


# -- the machine --------------------------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    here = measure_hardware(nvme=tmp_path / "not" / "yet" / "there")
    assert 1 <= here.cpu_count <= (os.cpu_count() or 1)
    assert 0 < here.ram_available_bytes <= here.ram_total_bytes <= psutil.virtual_memory().total
    assert here.disk_free_bytes is not None
    assert here.disk_total_bytes is not None
    assert 0 < here.disk_free_bytes <= here.disk_total_bytes
    assert not (tmp_path / "not").exists()
    assert measure_hardware().disk_free_bytes is None


@pytest.mark.cuda
def test_this_gpu() -> None:
    here = measure_hardware(resolve_device("cuda"))
    assert here.gpu_name
    assert 0 < here.gpu_free_bytes <= here.gpu_total_bytes
    held = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    less = measure_hardware(resolve_device("cuda"))
    assert less.gpu_free_bytes <= here.gpu_free_bytes - (200 << 20)
    del held  # torch keeps it cached, and can give it out again
    again = measure_hardware(resolve_device("cuda"))
    assert again.gpu_free_bytes >= less.gpu_free_bytes + (200 << 20)


def write_group(directory: Path, **values: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name.replace("__", ".")).write_text(value + "\n")


@pytest.fixture
def control_groups(tmp_path: Path) -> Callable[..., tuple[int, int]]:
    def within(membership: str, total: int, available: int) -> tuple[int, int]:
        (tmp_path / "membership").write_text(membership)
        return hardware._within_cgroup(total, available, tmp_path / "membership", tmp_path / "fs")

    return within


def test_version_2_group(tmp_path: Path, control_groups: Callable[..., tuple[int, int]]) -> None:
    leaf = tmp_path / "fs" / "user.slice" / "job"
    write_group(leaf, memory__max="max", memory__current="5")
    write_group(leaf.parent, memory__max="1000", memory__current="600", memory__stat="active_file 9\ninactive_file 150")
    assert control_groups("0::/user.slice/job\n", 8000, 7000) == (1000, 550)
    assert control_groups("0::/user.slice/job\n", 8000, 100) == (1000, 100)
    assert control_groups("0::/elsewhere\n", 8000, 7000) == (8000, 7000)


def test_the_tightest_group_counts(tmp_path: Path, control_groups: Callable[..., tuple[int, int]]) -> None:
    leaf = tmp_path / "fs" / "outer" / "inner"
    write_group(leaf, memory__max="500", memory__current="100")
    write_group(leaf.parent, memory__max="1000", memory__current="950")
    assert control_groups("0::/outer/inner\n", 8000, 7000) == (500, 50)


def test_version_1_group(tmp_path: Path, control_groups: Callable[..., tuple[int, int]]) -> None:
    unlimited = str(2**63 - 4096)
    write_group(tmp_path / "fs" / "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes="7")
    write_group(
        tmp_path / "fs" / "memory" / "docker",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="600",
        memory__stat="total_inactive_file 50",
    )
    assert control_groups("4:cpu,cpuacct:/x\n3:memory:/docker/abc\n0::/\n", 8000, 7000) == (1000, 450)
    assert control_groups("3:memory:/\n", 8000, 7000) == (8000, 7000)


def test_no_groups(tmp_path: Path) -> None:
    assert hardware._within_cgroup(10, 5, tmp_path / "missing", tmp_path) == (10, 5)


def test_facts_are_json() -> None:
    facts = json.loads(json.dumps(hardware.machine_facts()))
    assert facts["torch"] == torch.__version__
    assert facts["cpu"]
    assert facts["cpu_count"] >= 1
    assert {"ram_bytes", "gpu", "gpu_driver", "os", "python", "tierstore"} <= set(facts)


# -- the device ---------------------------------------------------------------------------------------------------------


def test_the_cpu_always_works() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device(torch.device("cpu", 0)) == CPU
    assert resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:-1", "cuda:banana", "cuda:999", "mps", "meta", "cpu0", 1.5, []])
def test_a_device_torch_cannot_use(device: Any) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_device(device)
    assert repr(device) in str(caught.value)
    assert '"cpu"' in str(caught.value)
    assert caught.value.remedy


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="sees no CUDA device"):
        resolve_device("cuda")
    assert resolve_device() == CPU


# -- a GPU that torch cannot use ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_warning(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process, on a machine with a driver and a CPU build of torch."""
    caches = (hardware.gpu_warning, hardware._log_once)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(hardware, "_has_nvidia_driver", lambda: True)
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def fake_nvml(names: list[str]) -> Any:
    module: Any = types.ModuleType("pynvml")
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetCount = lambda: len(names)
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetName = lambda handle: names[handle]
    return module


def test_says_so_once(fresh_warning: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fresh_warning.setitem(sys.modules, "pynvml", fake_nvml(["NVIDIA GeForce RTX 4070 Laptop GPU"]))
    first = hardware.warn_if_torch_cannot_use_gpu()
    assert first == hardware.warn_if_torch_cannot_use_gpu()
    assert len(caplog.records) == 1
    assert first is not None
    for part in ("NVIDIA GeForce RTX 4070 Laptop GPU", torch.__version__, "CPU build", "pytorch.org/get-started", "Windows"):
        assert part in first
    with pytest.raises(OptionError, match="4070"):
        resolve_device("cuda")


def test_several_gpus(fresh_warning: pytest.MonkeyPatch) -> None:
    fresh_warning.setitem(sys.modules, "pynvml", fake_nvml(["NVIDIA H100", "NVIDIA H100"]))
    assert "2 NVIDIA GPUs (NVIDIA H100)" in str(hardware.gpu_warning())


def test_an_old_driver_is_told_apart(fresh_warning: pytest.MonkeyPatch) -> None:
    fresh_warning.setitem(sys.modules, "pynvml", fake_nvml(["NVIDIA H100"]))
    fresh_warning.setattr(torch.version, "cuda", "13.0")
    assert "driver is probably too old" in str(hardware.gpu_warning())


def test_quiet_where_all_is_well(fresh_warning: pytest.MonkeyPatch) -> None:
    fresh_warning.setitem(sys.modules, "pynvml", fake_nvml([]))
    assert hardware.gpu_warning() is None  # a driver, but no GPU behind it
    hardware.gpu_warning.cache_clear()
    fresh_warning.setitem(sys.modules, "pynvml", fake_nvml(["NVIDIA H100"]))
    fresh_warning.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpu_warning() is None  # hidden on purpose
    hardware.gpu_warning.cache_clear()
    fresh_warning.delenv("CUDA_VISIBLE_DEVICES")
    fresh_warning.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.gpu_warning() is None


def test_never_raises(fresh_warning: pytest.MonkeyPatch) -> None:
    broken = fake_nvml(["NVIDIA H100"])
    broken.nvmlInit = lambda: (_ for _ in ()).throw(OSError("libnvidia-ml.so.1: wrong ELF class"))
    fresh_warning.setitem(sys.modules, "pynvml", broken)
    assert "an NVIDIA GPU driver" in str(hardware.gpu_warning())
    hardware.gpu_warning.cache_clear()
    fresh_warning.setattr(hardware, "_has_nvidia_driver", lambda: 1 / 0)
    assert hardware.gpu_warning() is None


def test_reaches_stderr_without_logging_set_up() -> None:
    script = """
        from tierstore import hardware
        hardware.gpu_warning = lambda: "This machine has a GPU that nobody asked."
        hardware.warn_if_torch_cannot_use_gpu()
        hardware.warn_if_torch_cannot_use_gpu()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.count("nobody asked") == 1
    assert done.stdout == ""


def test_costs_little_without_a_gpu(fresh_warning: pytest.MonkeyPatch) -> None:
    fresh_warning.undo()
    hardware.gpu_warning.cache_clear()
    if hardware._has_nvidia_driver():
        pytest.skip("this machine has an NVIDIA driver")
    elapsed = []
    for _ in range(3):
        hardware.gpu_warning.cache_clear()
        start = time.perf_counter()
        hardware.gpu_warning()
        elapsed.append(time.perf_counter() - start)
    assert min(elapsed) < 0.05
