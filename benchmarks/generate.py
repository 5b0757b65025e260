"""Text from a model that is streamed, beside the link that it comes over and beside accelerate's offloading.

python benchmarks/generate.py [--only NAME ...] [--device DEVICE] [--dir DIRECTORY] [--quick] [--output FILE]

A Llama with random weights in 16 bits, saved as a model folder, generates tokens one by one: by tierstore with its layers in RAM, and with
most of them on the drive, read from the model's own files; by accelerate's `cpu_offload` and `disk_offload`; and all resident. The links
are probed in the same run by loops that only move bytes. Of a token the median is told, after a warm-up; bytes are counted over the same
tokens. Attention is computed without cuDNN, which plans anew for each length of a sequence (60 ms a token, only once in a process: what
runs first would look slow). Results go to `benchmarks/results/generate-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import logging
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from benchmarks.core_parts.bare import PAGE, REQUEST_BYTES, THREADS, Copier
from tierstore import TierStore
from tierstore.hardware import machine_facts
from tierstore.huggingface import from_pretrained

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "accelerate")

SHAPES = {
    "quick": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 500},
    "cpu": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 32_000},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 32, "vocab_size": 32_000},
}
"""By device: half a billion parameters, and two."""

PROMPT_TOKENS = 16
DEVICE_SHARE, RAM_SHARE = 0.25, 0.35
"""Budgets, as shares of the model: of the device in both regimes, and of RAM where the rest stays on the drive."""

WARM_UP = 2
"""Tokens that are not measured, of contenders that plan nothing."""

WANTED = 0.9
"""Of the link's rate."""


@dataclass
class Row:
    """One contender.

    Attributes:
        tokens_s: Seconds of each token after the warm-up.
        link: The one that counts, with its bytes per token, and its probed rate.
        warm_up: Tokens before those.
        first_tokens: Of what was generated: all contenders' are equal.
    """

    name: str
    tokens_s: list[float] = field(default_factory=list)
    warm_up: int = WARM_UP
    link: str | None = None
    bytes_per_token: float = 0.0
    link_bytes_per_s: float = 0.0
    first_tokens: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.tokens_s)

    @property
    def of_link(self) -> float | None:
        """The share of the link's rate at which the bytes came."""
        if not self.link_bytes_per_s or not self.tokens_s:
            return None
        return self.bytes_per_token / statistics.mean(self.tokens_s) / self.link_bytes_per_s


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    folder: Path
    scratch: Path
    device: torch.device
    warm_up: int  # of contenders that plan
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def save_model(shape: str, folder: Path) -> None:
    """Write the folder with random weights, a few tensors in memory at a time."""
    config = transformers.LlamaConfig(**SHAPES[shape], dtype="bfloat16", bos_token_id=1, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with TierStore(
        gpu="1GB" if shape != "quick" else "4MB", ram="4GB" if shape != "quick" else "8MB", nvme=folder.parent / "made"
    ) as store:
        from tierstore.huggingface import save_pretrained  # noqa: PLC0415
        from tierstore.training import attach, empty_parameters  # noqa: PLC0415

        with empty_parameters():
            model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        save_pretrained(attach(model, store), folder, max_shard_size="2GB")
        for name in list(store):
            store.delete(name)


class Clock(transformers.LogitsProcessor):
    """Notes when each token is chosen, and calls back in between."""

    def __init__(self, device: torch.device, note: Callable[[], None], between: Callable[[], None] | None) -> None:
        self._device, self._note, self._between = device, note, between
        self.times: list[float] = []
        self._paused_s = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter() - self._paused_s)
        self._note()
        if self._between is not None:
            started = time.perf_counter()
            self._between()
            self._paused_s += time.perf_counter() - started
        return scores


def generate(
    model: Any, setting: Setting, row: Row, count: Callable[[], int] | None = None, between: Callable[[], None] | None = None
) -> Row:
    """Fill the row.

    Args:
        count: Tells the bytes that have crossed the link so far.
        between: Is called after each token, and not counted.
    """
    counts: list[int] = []
    clock = Clock(setting.device, lambda: counts.append(count() if count is not None else 0), between)
    prompt = torch.arange(3, 3 + PROMPT_TOKENS, device=setting.device)[None]
    with torch.no_grad():
        output = model.generate(
            prompt,
            max_new_tokens=row.warm_up + setting.tokens + 1,
            do_sample=False,
            logits_processor=transformers.LogitsProcessorList([clock]),
        )
    times = clock.times[row.warm_up :]
    row.tokens_s = [after - before for before, after in itertools.pairwise(times)]
    row.bytes_per_token = (counts[-1] - counts[row.warm_up]) / len(row.tokens_s)
    row.first_tokens = output[0, PROMPT_TOKENS:].tolist()
    return row


def streamed(setting: Setting, row: Row, ram: int, link: str) -> Row:
    row.link, row.warm_up = link, setting.warm_up
    with TierStore(int(setting.nbytes * DEVICE_SHARE), ram, device=setting.device) as store:
        model, _ = from_pretrained(setting.folder, store)
        generate(model, setting, row, lambda: store.stats().links[link].bytes)
        for name in list(store):
            store.delete(name)
    return row


def from_ram(setting: Setting, row: Row) -> Row:
    return streamed(setting, row, int(setting.nbytes * 1.3) + (64 << 20), "h2d")


def from_disk(setting: Setting, row: Row) -> Row:
    return streamed(setting, row, max(int(setting.nbytes * RAM_SHARE), 1 << 20), "nvme_read")


def resident(setting: Setting, row: Row) -> Row:
    model = transformers.AutoModelForCausalLM.from_pretrained(setting.folder).to(setting.device)
    return generate(model, setting, row)


def accelerate_cpu(setting: Setting, row: Row) -> Row:
    from accelerate import cpu_offload  # noqa: PLC0415 - an extra

    model = transformers.AutoModelForCausalLM.from_pretrained(setting.folder)
    return generate(cpu_offload(model, execution_device=setting.device), setting, row)


def accelerate_disk(setting: Setting, row: Row, *, cold: bool = False) -> Row:
    from accelerate import disk_offload  # noqa: PLC0415 - an extra

    directory = setting.scratch / row.name
    model = transformers.AutoModelForCausalLM.from_pretrained(setting.folder)
    model = disk_offload(model, str(directory), execution_device=setting.device)
    gc.collect()
    return generate(model, setting, row, between=(lambda: forget(directory)) if cold else None)


def accelerate_disk_cold(setting: Setting, row: Row) -> Row:
    return accelerate_disk(setting, row, cold=True)


def forget(directory: Path) -> None:
    """Have the system's cache drop the files, as it would by itself if they were larger than memory."""
    for path in directory.glob("*.dat"):
        file = os.open(path, os.O_RDONLY)
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


CONTENDERS: dict[str, tuple[str, Callable[[Setting, Row], Row]]] = {
    "tierstore-ram": ("tierstore, layers in RAM", from_ram),
    "tierstore-disk": ("tierstore, two thirds of the layers on the drive, in the model's own files", from_disk),
    "accelerate-cpu": ("accelerate's cpu_offload", accelerate_cpu),
    "accelerate-disk": ("accelerate's disk_offload, its files in the system's cache", accelerate_disk),
    "accelerate-disk-cold": ("accelerate's disk_offload, its files dropped from the cache after each token", accelerate_disk_cold),
    "resident": ("all resident", resident),
}


def read_rate(folder: Path) -> float:
    """Bytes per second of a bare threaded direct read of the model's files."""
    requests = []
    for path in sorted(folder.glob("*.safetensors")):
        file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        requests += [(file, start) for start in range(0, path.stat().st_size // PAGE * PAGE, REQUEST_BYTES)]
    buffers = [memoryview(mmap.mmap(-1, REQUEST_BYTES)) for _ in range(THREADS)]

    def one(index: int) -> int:
        return sum(os.preadv(file, [buffers[index]], start) for file, start in requests[index::THREADS])

    with ThreadPoolExecutor(THREADS) as pool:
        started = time.perf_counter()
        total = sum(pool.map(one, range(THREADS)))
        seconds = time.perf_counter() - started
    for file in {file for file, _ in requests}:
        os.close(file)
    return total / seconds


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes per second of bare copies to the device, of a layer each."""
    copier = Copier(device, nbytes, 8)
    copier.seconds(into=True, out=False)
    seconds = statistics.median(copier.seconds(into=True, out=False) for _ in range(3))
    copier.close()
    return 8 * nbytes / seconds


@contextmanager
def probed(setting: Setting, row: Row) -> Iterator[None]:
    """Probe the row's link before and after."""
    layer = setting.nbytes // 30

    def probe() -> float:
        return read_rate(setting.folder) if row.link == "nvme_read" else copy_rate(setting.device, layer)

    row.link = {"tierstore-ram": "h2d", "tierstore-disk": "nvme_read"}.get(row.name)
    before = probe() if row.link else 0.0
    yield
    if row.link:
        row.link_bytes_per_s = statistics.mean([before, probe()])


def show(report: dict[str, Any]) -> None:
    budgets = f"device {DEVICE_SHARE:.0%}, RAM {RAM_SHARE:.0%} where the drive is used"
    print(f"\n{report['model']}: {report['bytes'] / 1e9:.2f} GB; budgets: {budgets}")
    for name, row in report["rows"].items():
        if row["error"]:
            print(f"  {CONTENDERS[name][0]:76} {row['error']}")
            continue
        link = "" if row["of_link"] is None else f"  {row['of_link']:.2f} of {row['link_bytes_per_s'] / 1e9:.1f} GB/s by {row['link']}"
        print(f"  {CONTENDERS[name][0]:76} {1 / row['median_s']:7.2f} tokens/s{link}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="only this one; may be given several times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dir", type=Path, help="on the drive to be measured (default: the system's temporary directory)")
    parser.add_argument(
        "--warm-up", type=int, default=48, help="tokens of tierstore that are not measured (default: 48: a plan takes about thirty)"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are (default: 16)")
    parser.add_argument("--quick", action="store_true", help="a small scale, to see that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/generate-DEVICE.json)")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.warm_up < 0:
        parser.error("--tokens wants at least 1, --warm-up at least 0")
    logging.getLogger("tierstore").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    output = options.output or ROOT / "benchmarks" / "results" / f"generate-{options.device}.json"
    shape = "quick" if options.quick else options.device
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"rows": {}}
    report["machine"] = machine_facts()
    report["versions"] = {name: version(name) for name in LIBRARIES if importlib.util.find_spec(name)}
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="tierstore-generate-") as made:
        setting = Setting(Path(made) / "model", Path(made), device, options.warm_up, options.tokens)
        save_model(shape, setting.folder)
        report |= {"model": f"Llama {SHAPES[shape]}", "bytes": setting.nbytes, "threads": torch.get_num_threads(), "wanted": WANTED}
        for name in dict.fromkeys(options.only or CONTENDERS):
            row = Row(name)
            if name.startswith("accelerate") and importlib.util.find_spec("accelerate") is None:
                row.error = "not installed"
            else:
                with probed(setting, row):
                    CONTENDERS[name][1](setting, row)
                gc.collect()
            kept = asdict(row) | {"quick": options.quick}
            kept |= {"median_s": row.median_s if row.tokens_s else None, "of_link": row.of_link}
            report["rows"][name] = kept
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {row.error or f'{1 / row.median_s:.2f} tokens/s'}", flush=True)
    show(report)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
