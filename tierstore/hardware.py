"""What this machine has, and how much of it a store may take."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from tierstore.errors import DirectoryError, OptionError, SizeError
from tierstore.units import LinkRates, format_bytes, parse_size

__all__ = [
    "BUDGET_MULTIPLE",
    "Budgets",
    "Hardware",
    "LinkRates",
    "gpu_warning",
    "machine_facts",
    "measure_hardware",
    "resolve_budgets",
    "resolve_device",
    "warn_if_torch_cannot_use_gpu",
]

log = logging.getLogger("tierstore")
_T = TypeVar("_T")

BUDGET_MULTIPLE = 4096
"""Budgets are whole pages: arenas are handed out, and drives written, in units of this many bytes. It is also the least budget."""

GPU_RESERVE_BYTES = 1 << 30
GPU_RESERVE_SHARE = 4
CPU_ARENA_BYTES = 2 << 30
CPU_ARENA_SHARE = 8
RAM_SHARE = 0.6
DISK_SHARE = 0.95


# -- what there is ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this process can use, at the moment of asking.

    Attributes:
        cpu_count: Processors this process may run on.
        ram_total_bytes: Host memory, or the container's limit where that is less.
        ram_available_bytes: Host memory that can be taken without swapping, within the same limit.
        gpu_name: None where torch has no CUDA device.
        gpu_total_bytes: Memory of the GPU, or the part of it that this process is allowed.
        gpu_free_bytes: What of it this process can still allocate, memory cached by torch included.
        disk_total_bytes: Size of the file system that holds the NVMe directory; None without one.
        disk_free_bytes: What this user can still write there.
    """

    cpu_count: int
    ram_total_bytes: int
    ram_available_bytes: int
    gpu_name: str | None = None
    gpu_total_bytes: int = 0
    gpu_free_bytes: int = 0
    disk_total_bytes: int | None = None
    disk_free_bytes: int | None = None


def measure_hardware(device: torch.device | None = None, nvme: str | os.PathLike[str] | None = None) -> Hardware:
    """Look at this machine.

    Args:
        device: The compute device; a CUDA device is asked for its memory, which starts CUDA in this process.
        nvme: The NVMe directory. It need not exist yet: the nearest parent that does is asked.
    """
    memory = psutil.virtual_memory()
    total, available = _within_cgroup(memory.total, memory.available, Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    gpu_name, gpu_total, gpu_free = _gpu_memory(device) if device is not None and device.type == "cuda" else (None, 0, 0)
    disk = None if nvme is None else _disk_usage(Path(nvme).expanduser())
    return Hardware(
        cpu_count=_usable_cpus(),
        ram_total_bytes=total,
        ram_available_bytes=available,
        gpu_name=gpu_name,
        gpu_total_bytes=gpu_total,
        gpu_free_bytes=gpu_free,
        disk_total_bytes=disk.total if disk else None,
        disk_free_bytes=disk.free if disk else None,
    )


def _usable_cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _disk_usage(path: Path) -> Any:
    """(total, used, free) of the file system that holds a path, or would.

    Raises:
        DirectoryError: The path cannot be looked at.
    """
    try:
        path = path.absolute()
        return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists()))
    except OSError as error:
        raise DirectoryError(
            f"{str(path)[:200]!r} cannot hold a store", have=error.strerror or str(error), remedy="name another directory", path=str(path)
        ) from error


def held_bytes(nvme: str | os.PathLike[str] | None) -> int:
    """What the files in a directory occupy; 0 where there is none, or it cannot be read (opening it will say so)."""
    if nvme is None:
        return 0
    try:
        with os.scandir(Path(nvme).expanduser()) as found:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in found)
    except OSError:
        return 0


def _gpu_memory(device: torch.device) -> tuple[str, int, int]:
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    # What torch has cached is free to the next allocation, though the driver counts it as used.
    free += reserved - allocated
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return torch.cuda.get_device_name(device), allowed, max(0, min(free, allowed - allocated))


def _within_cgroup(total: int, available: int, membership: Path, mount: Path) -> tuple[int, int]:
    """Narrow (total, available) to the limits of the control groups this process is in, version 1 or 2.

    psutil reports the machine; a container that takes more than its own limit is killed without a word.
    """
    machine = total
    for directory, limit_file, usage_file, idle_key in _cgroups(membership, mount):
        limit, usage = _read_number(directory / limit_file), _read_number(directory / usage_file)
        if limit is None or limit >= machine:  # version 1 writes "no limit" as a huge number
            continue
        total = min(total, limit)
        # Idle page cache counts as usage but is dropped under pressure.
        available = min(available, max(0, limit - (usage or 0) + _read_stat(directory / "memory.stat", idle_key)))
    return total, available


def _cgroups(membership: Path, mount: Path) -> list[tuple[Path, str, str, str]]:
    """Directories of this process's memory groups, innermost first, each with its file names."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found: list[tuple[Path, str, str, str]] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inner = rest.partition(":")
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            roots = [mount, mount / "unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            roots = [mount / controllers, mount / "memory"]
        else:
            continue
        for root in roots:
            leaf = root / inner.lstrip("/")
            # Inside a container the path may be that of the host, of which only the mount itself is visible here.
            found += [(directory, *names) for directory in (leaf, *leaf.parents) if directory.is_relative_to(root)]
    return found


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group here, or the word "max"
        return None


def _read_stat(path: Path, key: str) -> int:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return next((int(row[1]) for row in rows if row[0] == key), 0)
    except (OSError, ValueError, IndexError):
        return 0


# -- what a store may take ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Budgets:
    """Hard limits in bytes on what the store holds per tier, multiples of 4096.

    Attributes:
        gpu_bytes: On the compute device.
        ram_bytes: In host memory.
        nvme_limit_bytes: In the NVMe directory; None without one.
    """

    gpu_bytes: int
    ram_bytes: int
    nvme_limit_bytes: int | None = None


def resolve_budgets(
    gpu: int | str = "auto",
    ram: int | str = "auto",
    nvme_limit: int | str | None = None,
    *,
    device: torch.device,
    hardware: Hardware,
    nvme_held_bytes: int = 0,
) -> Budgets:
    """Turn what the user asked for into bytes, and log them once.

    [Note: What "auto" leaves free]
    The store is not alone. On a GPU, activations, gradients of the layer at work and kernels' workspaces need room: a quarter of
    the free memory and at least 1 GiB stay free. Of available RAM 60 % is taken: page-locked memory cannot be swapped, and data
    loaders and the page cache need the rest. On a CPU device the `gpu` tier is ordinary memory, an eighth of what is available and at
    most 2 GiB, and the `ram` tier takes 60 % of what that leaves. `nvme_limit` defaults to 95 % of what is free or already held by the
    store itself.

    Args:
        gpu: A size, a share of the device's memory (of RAM on a CPU device), or "auto".
        ram: A size, a share of RAM, or "auto".
        nvme_limit: A size, a share of the file system, or None or "auto" for the default.
        device: The compute device.
        hardware: What there is; its disk figures decide whether there is an NVMe tier.
        nvme_held_bytes: What the store's own files in the directory occupy already.

    Raises:
        SizeError: A size that does not parse, is less than one page, or that this machine cannot give.
    """
    if device.type == "cpu":
        gpu_bytes, ram_bytes = _resolve_cpu(gpu, ram, hardware)
    else:
        gpu_bytes, ram_bytes = _resolve_gpu(gpu, hardware), _resolve_ram(ram, hardware, taken=0)
    budgets = Budgets(gpu_bytes, ram_bytes, _resolve_nvme(nvme_limit, hardware, nvme_held_bytes))
    chosen = [("gpu", gpu, budgets.gpu_bytes), ("ram", ram, budgets.ram_bytes), ("nvme_limit", nvme_limit, budgets.nvme_limit_bytes)]
    parts = [f"{option} {nbytes} bytes ({format_bytes(nbytes)}, from {given!r})" for option, given, nbytes in chosen if nbytes is not None]
    log.info("budgets on %s: %s", device, ", ".join(parts))
    return budgets


def _resolve_cpu(gpu: int | str, ram: int | str, hardware: Hardware) -> tuple[int, int]:
    """Both tiers come out of the same memory: what was asked for by name is settled first, "auto" shares the rest."""
    if gpu == "auto":
        claimed = 0 if ram == "auto" else _resolve_ram(ram, hardware, taken=0)
        left = max(0, hardware.ram_available_bytes - claimed)
        gpu_bytes = _whole_pages(min(left // CPU_ARENA_SHARE, CPU_ARENA_BYTES), "gpu", gpu)
    else:
        total = hardware.ram_total_bytes
        gpu_bytes = _whole_pages(parse_size(gpu, total=total, what="gpu="), "gpu", gpu)
        _check(gpu_bytes, "gpu", gpu, "RAM (the device is the CPU)", total=total, free=hardware.ram_available_bytes)
    return gpu_bytes, _resolve_ram(ram, hardware, taken=gpu_bytes)


def _resolve_gpu(gpu: int | str, hardware: Hardware) -> int:
    free = hardware.gpu_free_bytes
    if gpu == "auto":
        return _whole_pages(free - max(GPU_RESERVE_BYTES, free // GPU_RESERVE_SHARE), "gpu", gpu)
    nbytes = _whole_pages(parse_size(gpu, total=hardware.gpu_total_bytes, what="gpu="), "gpu", gpu)
    _check(nbytes, "gpu", gpu, f"memory on {hardware.gpu_name or 'the GPU'}", total=hardware.gpu_total_bytes, free=free)
    return nbytes


def _resolve_ram(ram: int | str, hardware: Hardware, *, taken: int) -> int:
    """Bytes of the RAM tier beside `taken` bytes of it that are the `gpu` tier of a CPU device."""
    if ram == "auto":
        return _whole_pages(int((hardware.ram_available_bytes - taken) * RAM_SHARE), "ram", ram)
    nbytes = _whole_pages(parse_size(ram, total=hardware.ram_total_bytes, what="ram="), "ram", ram)
    where = f"RAM beside the {format_bytes(taken)} of gpu= (the device is the CPU, both are host memory)" if taken else "RAM"
    _check(nbytes, "ram", ram, where, total=hardware.ram_total_bytes - taken, free=hardware.ram_available_bytes - taken)
    return nbytes


def _resolve_nvme(limit: int | str | None, hardware: Hardware, held: int) -> int | None:
    if hardware.disk_total_bytes is None or hardware.disk_free_bytes is None:
        if limit not in (None, "auto"):
            remedy = "name a directory with nvme=, or leave nvme_limit= out"
            raise OptionError("nvme_limit= was given without nvme=", have=repr(limit), remedy=remedy)
        return None
    reachable = hardware.disk_free_bytes + held
    if limit is None or limit == "auto":
        # May be nothing: a store on a full drive must still open, to be read or to delete from.
        return int(reachable * DISK_SHARE) // BUDGET_MULTIPLE * BUDGET_MULTIPLE
    nbytes = _whole_pages(parse_size(limit, total=hardware.disk_total_bytes, what="nvme_limit="), "nvme_limit", limit)
    # More than is free right now is allowed: it is a limit, nothing is reserved, and the user may be about to clear the rest.
    _check(nbytes, "nvme_limit", limit, "on the drive", total=hardware.disk_total_bytes, free=hardware.disk_total_bytes)
    if nbytes > reachable:
        log.warning("nvme_limit is %s, but only %s are free or held by this store", format_bytes(nbytes), format_bytes(reachable))
    return nbytes


def _whole_pages(nbytes: int, option: str, given: object) -> int:
    nbytes -= nbytes % BUDGET_MULTIPLE
    if nbytes >= BUDGET_MULTIPLE:
        return nbytes
    if given == "auto":
        problem, remedy = f"too little memory is free to choose {option}= by itself", f"free some, or give {option}= in bytes"
    else:
        problem, remedy = f"{option}={given!r} is too small to hold any block", f"raise {option}="
    need, have = f"at least {BUDGET_MULTIPLE} bytes", f"{max(0, nbytes)} bytes"
    raise SizeError(problem, need=need, have=have, remedy=remedy, option=option, size=given)


def _check(nbytes: int, option: str, given: object, where: str, *, total: int, free: int) -> None:
    """Refuse what the machine does not have, and what it has but something else uses: taking it would swap, or kill a process."""
    if nbytes > total:
        problem, limit = f"{option}={given!r} is larger than this machine", max(0, total)
        have, remedy = f"{limit} bytes ({format_bytes(limit)}) of {where}", f'lower {option}=, or use "auto"'
    elif nbytes > free:
        problem, limit = f"{option}={given!r} is more than is free now", max(0, free)
        have = f"{limit} bytes ({format_bytes(limit)}) free of {total} ({format_bytes(total)}) {where}"
        remedy = f'lower {option}=, use "auto", or end what uses the rest'
    else:
        return
    need = f"{nbytes} bytes ({format_bytes(nbytes)})"
    raise SizeError(problem, need=need, have=have, remedy=remedy, option=option, size=given, need_bytes=nbytes, have_bytes=limit)


# -- which device -------------------------------------------------------------------------------------------------------


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to compute on: the current CUDA device where torch has one, else the CPU, unless the user names one.

    Raises:
        OptionError: torch cannot use that device, or tierstore does not know its kind.
    """
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise _no_device(device, "torch knows no such device") from None
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise _no_device(device, f"tierstore moves nothing to {wanted.type!r} devices")
    if not torch.cuda.is_available():
        raise _no_device(device, f"torch {torch.__version__} sees no CUDA device", hint=gpu_warning())
    count = torch.cuda.device_count()
    if wanted == torch.device("cuda"):  # no number given
        return torch.device("cuda", torch.cuda.current_device())
    if not 0 <= wanted.index < count:  # torch keeps the number in one signed byte
        raise _no_device(device, f"there is no GPU number {wanted.index}: torch sees {count}, numbered from 0")
    return wanted


def _no_device(device: object, why: str, *, hint: str | None = None) -> OptionError:
    usable = '"cuda", "cuda:0", ... or "cpu"' if torch.cuda.is_available() else '"cpu"'
    remedy = "name one that is, or leave device= out" + (f". {hint}" if hint else "")
    return OptionError(f"device={device!r} cannot be used: {why}", need=f"device={usable}", have=repr(device), remedy=remedy, device=device)


@functools.cache
def gpu_warning() -> str | None:
    """One sentence or two for a machine whose NVIDIA GPU torch cannot use; None where all is well or there is no such GPU.

    Any thread. Never raises: a machine with half a driver must still be able to train on its CPU.
    """
    try:
        # Whoever hides the GPUs on purpose knows.
        if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
            return None
        name = _nvidia_gpu()
    except Exception:  # drivers, loaders and NVML fail in ways that no list would cover; a hint is not worth a crash
        return None
    if name is None:
        return None
    if torch.version.cuda is not None:
        return (
            f"This machine has {name}, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it: "
            f"the NVIDIA driver is probably too old for that CUDA version. Update the driver, or install a torch built for an older CUDA."
        )
    return (
        f"This machine has {name}, but the installed torch {torch.__version__} is a CPU build and cannot use it. "
        f"Install a CUDA build of torch (choose your system and CUDA at https://pytorch.org/get-started/locally; "
        f"on Windows, torch from PyPI is always a CPU build)."
    )


def warn_if_torch_cannot_use_gpu() -> str | None:
    """Log `gpu_warning()`, once per process; without logging set up it reaches stderr all the same. Returns it."""
    message = gpu_warning()
    if message is not None:
        _log_once(message)
    return message


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _nvidia_gpu() -> str | None:
    """What to call the NVIDIA GPU of this machine in a sentence, or None.

    Cheap signs of a driver come first: NVML's bindings take longer to import than a machine without a GPU should have to wait.
    """
    if not _has_nvidia_driver():
        return None
    names = _ask_nvml(
        lambda nvml: [str(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))) for index in range(nvml.nvmlDeviceGetCount())]
    )
    if names is None:
        return "an NVIDIA GPU driver"
    if not names:
        return None
    return names[0] if len(names) == 1 else f"{len(names)} NVIDIA GPUs ({names[0]})"


def _has_nvidia_driver() -> bool:
    if sys.platform == "win32":
        signs = [Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvml.dll"]
    else:
        signs = [Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libnvidia-ml.so.1")]
    return any(sign.exists() for sign in signs) or shutil.which("nvidia-smi") is not None


def _ask_nvml(question: Callable[[Any], _T]) -> _T | None:
    """Put a question to the driver; None where it cannot be asked."""
    try:
        import pynvml  # noqa: PLC0415  # takes tens of milliseconds, and only machines with a driver need it

        pynvml.nvmlInit()
        try:
            return question(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no library, a driver that does not match its kernel module, a GPU that fell off the bus: no answer
        return None


# -- for the record -----------------------------------------------------------------------------------------------------


def machine_facts() -> dict[str, Any]:
    """What a benchmark must say about the machine it ran on; values are JSON."""
    hardware = measure_hardware()
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_count": hardware.cpu_count,
        "ram_bytes": hardware.ram_total_bytes,
        "gpu": None,
        "gpu_bytes": None,
        "gpu_driver": _ask_nvml(lambda nvml: str(nvml.nvmlSystemGetDriverVersion())) if _has_nvidia_driver() else None,
        "cuda": torch.version.cuda,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tierstore": _version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_bytes"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return facts


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version() -> str:
    try:
        return importlib.metadata.version("tierstore")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
