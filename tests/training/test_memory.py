"""Nothing grows with the number of steps: not memory, not Python's objects, not files, threads or descriptors, not blocks.

`TIERSTORE_TRAINING_STEPS` is how many steps are taken; 1000 nightly.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from tests.quiet import disk_bytes
from tests.training.harness import layers_of
from tests.training.models import Language, batches
from tierstore import TierStore
from tierstore.trace import Timeline, Trace
from tierstore.training import TieredOptimizer, attach

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
STEPS = int(os.environ.get("TIERSTORE_TRAINING_STEPS") or (1000 if NIGHTLY else 120))


MOMENTS = 8
"""How often what is held is counted. What grows is more at each of the last three than at each of the third to the fifth."""


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Held:
    """What the process and the store hold at one moment."""

    objects: int
    allocated_blocks: int
    tensors: int
    tensor_bytes: int
    resident_bytes: int
    threads: int
    descriptors: int
    blocks: int
    files: int
    drive_bytes: int

    @staticmethod
    def now(store: TierStore, directory: Path) -> Held:
        gc.collect()
        allocated = sys.getallocatedblocks()
        objects = gc.get_objects()
        tensors = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in objects if type(each) is torch.Tensor}
        return Held(
            objects=len(objects),
            allocated_blocks=allocated,
            tensors=len(tensors),
            tensor_bytes=sum(tensors.values()),
            resident_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if sys.platform == "linux" else 0,
            threads=threading.active_count(),
            descriptors=len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0,
            blocks=len(store),
            files=len(os.listdir(directory)),
            drive_bytes=disk_bytes(directory),
        )


SLACK = Held(
    objects=40,
    allocated_blocks=1000,
    tensors=10,
    tensor_bytes=64 << 10,
    resident_bytes=6 << 20,
    threads=1,
    descriptors=8,  # of shards, which are kept open
    blocks=0,
    files=8,
    drive_bytes=512 << 10,
)
"""By how much the least of the late moments may exceed the most of the early ones: what is cached, in flight, or about to be collected."""


@pytest.mark.timeout(120 + 2 * STEPS)
@pytest.mark.parametrize(("when", "activations"), [("deferred", "ram"), ("step", "device")])
def test_nothing_grows_with_the_number_of_steps(when: str, activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits, evaluations, passes without backward and passes that fail come in between."""
    monkeypatch.setattr("tierstore.policies.forecast.KEEP", 512)
    monkeypatch.setattr("tierstore.training.activations.SMALL", 64)
    directory = tmp_path / "swap"
    torch.manual_seed(0)
    model = Language(2)
    data = batches("language", 1 << 30, 4)
    held: list[Held] = []
    with TierStore(96 << 10, 260 << 10, directory, device="cpu", nvme_limit="16MB") as store:
        store.engine.scheduler.trace = Trace(keep=500)
        store.engine.timeline = Timeline(100)
        tiered = attach(model, store, layers_of(model), micro_batch=2, activations=activations)  # type: ignore[arg-type]
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-3, when=when)  # type: ignore[arg-type]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        tiered.resume(scheduler=scheduler)

        def fail(*_: object) -> None:
            raise ValueError("struck")

        for step in range(STEPS):
            inputs, targets = next(data)
            if step % 7 == 3:
                model(inputs, targets)
            if step % 7 == 5:
                with torch.no_grad():
                    model(inputs, targets)
            if step % 11 == 4:
                handle = model.blocks[0].register_forward_hook(lambda module, args, result: result[0].register_hook(fail) and None)
                with pytest.raises(ValueError, match="struck"):
                    model(inputs, targets).backward()
                handle.remove()
                optimizer.zero_grad()
            loss = model(inputs, targets)
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            del loss
            if step % 10 == 9:
                store.commit({"step": step})
            if (step + 1) % (STEPS // MOMENTS) == 0:
                store.commit()
                held.append(Held.now(store, directory))
        assert store.stats().tiers["gpu"].evictions > STEPS
        assert all(store.stats().links[link].bytes > 0 for link in ("nvme_read", "nvme_write"))
    series = {key: [asdict(each)[key] for each in held] for key in asdict(SLACK)}
    grown = {key: each for key, each in series.items() if min(each[-3:]) - max(each[2:5]) > asdict(SLACK)[key]}
    assert not grown, grown


def test_what_is_held_is_seen(tmp_path: Path) -> None:
    """The measure itself: each thing that is kept on purpose is counted."""
    with TierStore("64KiB", "8MiB", tmp_path / "swap", device="cpu") as store:
        before = Held.now(store, tmp_path / "swap")
        kept: list[object] = [torch.ones(64, 1024), [[number] for number in range(1000)], open(os.devnull)]  # noqa: SIM115
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        for number in range(8):
            store.put(f"b{number}", torch.ones(100_000 // 8))
        store.commit()
        after = Held.now(store, tmp_path / "swap")
        done.set()
        thread.join()
        kept[2].close()  # type: ignore[attr-defined]
    assert after.tensors - before.tensors == 1
    assert after.tensor_bytes - before.tensor_bytes == 64 * 1024 * 4
    assert after.objects - before.objects >= 1000
    assert after.allocated_blocks - before.allocated_blocks >= 1000
    assert after.blocks - before.blocks == 8
    assert after.threads > before.threads
    assert after.files > before.files
    assert after.drive_bytes - before.drive_bytes >= 400_000
    if sys.platform == "linux":
        assert after.descriptors > before.descriptors
