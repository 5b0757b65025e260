"""What a training has beside its large tensors, as one small block: so that a commit has all of it, and one script begins and goes on."""

from __future__ import annotations

import json
import logging
import random
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tierstore.catalog import PAGE
from tierstore.errors import TensorError, TrainingError
from tierstore.sync import TierStore
from tierstore.training.activations import PREFIX as ACTIVATIONS
from tierstore.training.gradients import PREFIX as GRADIENTS
from tierstore.training.packing import damaged_unless_sound, pack, unpack
from tierstore.training.pieces import Stored, parse_piece

if TYPE_CHECKING:
    from tierstore.training.chunks import Chunk
    from tierstore.training.layers import Tiered
    from tierstore.training.optimizer import Coefficient, TieredOptimizer
    from tierstore.training.structure import Weight

log = logging.getLogger("tierstore")

BLOCK = "training/state"
"""What does not fit goes on in `training/state/1` and so on. Together they are the bytes of one safetensors file."""

SHARE = 4
"""One takes at most one part in so many of the device, and of RAM."""

STATE = "optimizer/"
VERSION = 1


def write_state(store: TierStore, tensors: dict[str, Tensor]) -> None:
    """Put tensors into blocks, none of them large: a block has to fit the device, though nobody will ever want these there."""
    capacities = [arena.capacity_bytes for arena in store.engine.placement.arenas.values()]
    length = max(PAGE, min(capacities) // SHARE // PAGE * PAGE)
    payload = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
    pieces = {f"{BLOCK}/{number}" if number else BLOCK: piece for number, piece in enumerate(payload.split(length))}
    if _holds(store, pieces):
        return  # not to be a change since the last commit
    for name in _names(store):
        store.delete(name)
    for name, piece in pieces.items():
        store.put(name, piece)


def _names(store: TierStore) -> list[str]:
    return [name for name in store if name == BLOCK or name.startswith(f"{BLOCK}/")]


def _holds(store: TierStore, pieces: Mapping[str, Tensor]) -> bool:
    if pieces.keys() != set(_names(store)):
        return False
    present = {name: store.read(name) for name in pieces}
    return all(isinstance(have, Tensor) and torch.equal(have, pieces[name]) for name, have in present.items())


def read_state(store: TierStore) -> dict[str, Tensor]:
    """What `write_state` was given."""
    count = sum(name.startswith(f"{BLOCK}/") for name in store)
    pieces = [store.read(f"{BLOCK}/{number}" if number else BLOCK) for number in range(count + 1)]
    tensors: dict[str, Tensor] = load(b"".join(bytes(piece.numpy()) for piece in pieces if isinstance(piece, Tensor)))
    return tensors


class State:
    """Writes the block before each commit, and reads it when a store is attached that holds one."""

    def __init__(self, tiered: Tiered) -> None:
        self._tiered = tiered
        self._objects: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._resumed = False
        self._stepped = False
        self._warned = False
        self._versions: dict[tuple[nn.Module, str], tuple[Tensor, int]] = {}
        self._restored: set[str] = set()
        self._before_commit: Callable[[], None] | None = None

    def read(self) -> None:
        """Read the block, if the store has it.

        Raises:
            TensorError: It is of another model, or damaged.
        """
        store = self._tiered.store
        if BLOCK not in store:
            return
        with damaged_unless_sound():
            stored = read_state(store)
            self._found = json.loads(bytes(stored.pop("json").numpy()))
            self._tensors = {name.removeprefix("tensor "): tensor for name, tensor in stored.items()}
            if self._found["version"] != VERSION:
                raise TensorError(f"{BLOCK!r} has version {self._found['version']}", need=VERSION, remedy="use the tierstore that wrote it")
            for key, kind in (
                ("model", list),
                ("gradients", dict),
                ("buffers", dict),
                ("optimizers", dict),
                ("objects", dict),
                ("random", dict),
            ):
                if not isinstance(self._found[key], kind):
                    raise TypeError(f"no {key}")
            have, need = self._found["model"], [block.name for block in self._tiered.structure.blocks]
            if have != need:
                example = next(iter([*(name for name in have if name not in need), *(name for name in need if name not in have), *need]))
                raise TensorError(
                    "the store's commit is of another model, or of other layers",
                    need=f"{len(need)} blocks",
                    have=f"{len(have)}; the difference begins at {example!r}",
                    remedy="attach the model that was committed, with the same layers=, or open another directory",
                )

    def open(self) -> None:
        """The model is attached: take over what the commit has of gradients and buffers."""
        tiered, store = self._tiered, self._tiered.store
        with damaged_unless_sound():
            if tiered.resumed:
                self._restore_buffers()
            gradients = self._found.get("gradients", {})
            unknown = [name for name in gradients if name not in store]
            if unknown:
                raise ValueError(f"no gradients {unknown[0]!r}")
        for name in list(store):
            kept = name.startswith(GRADIENTS) and name in gradients
            if name.startswith(ACTIVATIONS) or (name.startswith(GRADIENTS) and not kept):
                store.delete(name)
        with damaged_unless_sound():
            for total in tiered.gradients.of.values():  # of a commit in the middle of accumulation
                total.restore(gradients)
        for module in tiered.model.modules():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    self._versions[module, attribute] = (buffer, buffer._version)
        # Weakly: the engine lives as long as its thread does, and is ended when nobody has the store any more.
        this = weakref.WeakMethod(self.write)

        def write() -> None:
            present = this()
            if present is not None:
                present()

        self._before_commit = write
        store.engine.before_commit.append(write)

    def close(self) -> None:
        """The model is detached."""
        assert self._before_commit is not None
        self._tiered.store.engine.before_commit.remove(self._before_commit)

    # -- writing -----------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write the block. Pending updates have been carried out."""
        tiered = self._tiered
        if tiered.activations is not None:
            tiered.activations.settle()
        tiered.buffers.give_up()
        tensors: dict[str, Tensor] = {}
        gradients = [part for total in tiered.gradients.of.values() for part in total.parts if part.present]
        found = {
            "version": VERSION,
            "model": [block.name for block in tiered.structure.blocks],
            "gradients": {part.name: sorted(weight.name for weight in part.present) for part in gradients},
            "buffers": {name: pack(buffer, tensors, f"buffer {name!r}") for name, buffer in self._changed_buffers().items()},
            "optimizers": {optimizer.name: self._describe(optimizer, tensors) for optimizer in tiered.optimizers},
            "objects": {name: pack(each.state_dict(), tensors, name) for name, each in self._objects.items()},
            "random": {
                "python": pack(random.getstate(), tensors),
                "numpy": pack(np.random.get_state(), tensors),
                "torch": pack(torch.get_rng_state(), tensors),
                "cuda": pack(torch.cuda.get_rng_state(tiered.device), tensors) if tiered.device.type == "cuda" else None,
            },
        }
        text = torch.frombuffer(bytearray(json.dumps(found, allow_nan=False).encode()), dtype=torch.uint8)
        write_state(tiered.store, {"json": text, **{f"tensor {name}": tensor for name, tensor in tensors.items()}})

    def _describe(self, optimizer: TieredOptimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
        optimizer.finish()  # nothing is pending; but what the steps have changed of the options is to be there
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return {
            "class": optimizer.class_name,
            "master_dtype": pack(optimizer.master_dtype, tensors),
            "clipped": [self._pack_clipped(each, tensors) for each in optimizer.clipped],
            "groups": [pack(group, tensors, f"optimizer {optimizer.name!r}") for group in groups],
            "attributes": pack(optimizer.attributes, tensors, f"optimizer {optimizer.name!r}"),
            "chunks": {chunk.name: self._describe_chunk(chunk, tensors) for chunk in optimizer.chunks},
        }

    @staticmethod
    def _pack_clipped(coefficient: Coefficient, tensors: dict[str, Tensor]) -> Any:
        by_name = coefficient if isinstance(coefficient, Tensor) else {key.name: value for key, value in coefficient.items()}
        return pack(by_name, tensors, "clip coefficients")

    def _unpack_clipped(self, packed: Any) -> Coefficient:
        unpacked = self._unpack(packed)
        if isinstance(unpacked, Tensor):
            return unpacked
        by_name = {weight.name: weight for weight in self._tiered.structure.weights}
        return {by_name[name]: value for name, value in unpacked.items()}

    @staticmethod
    def _describe_chunk(chunk: Chunk, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "blocks": chunk.blocks,
            "pieces": {
                piece.key: {"tensors": chunk.tensors[piece], "values": pack(chunk.values[piece], tensors, f"state of {piece.key!r}")}
                for piece in chunk.pieces
            },
        }

    def _changed_buffers(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prefix, module in self._tiered.model.named_modules():
            for attribute, buffer in module._buffers.items():
                name = f"{prefix}.{attribute}" if prefix else attribute
                if buffer is None or attribute in module._non_persistent_buffers_set:
                    continue
                before = self._versions.get((module, attribute))
                # Batch norm updates its statistics behind autograd's back: of floating-point ones the version does not tell.
                same = before is not None and before[0] is buffer and before[1] == buffer._version
                if name in self._restored or not same or buffer.is_floating_point():
                    found[name] = buffer
        return found

    # -- reading -----------------------------------------------------------------------------------------------------------

    def _unpack(self, packed: Any) -> Any:
        return unpack(packed, self._tensors, self._tiered.device)

    def _restore_buffers(self) -> None:
        modules = dict(self._tiered.model.named_modules())
        for name, packed in self._found.get("buffers", {}).items():
            prefix, _, attribute = name.rpartition(".")
            module = modules.get(prefix)
            if module is None or module._buffers.get(attribute) is None:
                raise TensorError(f"the commit has a buffer {name!r} that the model has not", remedy="attach the model that was committed")
            module._buffers[attribute] = self._unpack(packed).to(self._tiered.device)
            self._restored.add(name)

    def restore_optimizer(self, optimizer: TieredOptimizer) -> None:
        """Take over the state that the commit has of an optimizer that was just made.

        Raises:
            TrainingError: It is of another class, or of other parameters.
        """
        found = self._found.get("optimizers", {}).get(optimizer.name)
        if found is None:
            for name in [name for name in self._tiered.store if name.startswith(f"{STATE}{optimizer.name}/")]:
                self._tiered.store.delete(name)
            if self._tiered.resumed:
                log.warning("the store's commit has no state of an optimizer %r: it begins anew", optimizer.name)
            return
        with damaged_unless_sound():
            self._restore_optimizer(optimizer, found)

    def _restore_optimizer(self, optimizer: TieredOptimizer, found: dict[str, Any]) -> None:
        lacking = [name for chunk in found["chunks"].values() for name in chunk["blocks"] if name not in self._tiered.store]
        if lacking:
            raise ValueError(f"no state {lacking[0]!r}")
        weights = {weight.name: weight for weight in self._tiered.structure.weights}
        stored = [(chunk, key, parse_piece(key, weights)) for chunk in found["chunks"].values() for key in chunk["pieces"]]
        names = {piece.weight.name if piece is not None else key for _, key, piece in stored}
        need = (optimizer.class_name, optimizer.master_dtype, {weight.name for weight in optimizer.weights})
        have = (found["class"], self._unpack(found["master_dtype"]), names)
        if have != need:
            example = min(need[2] ^ have[2], default=None)
            raise TrainingError(
                f"the commit's optimizer {optimizer.name!r} is another one",
                need=f"{need[0]}, masters {need[1]}, {len(need[2])} parameters",
                have=f"{have[0]}, masters {have[1]}, {len(have[2])} parameters" + (f"; one has {example!r}" if example else ""),
                remedy="make it as it was made for the commit, or give it another name= to begin anew",
            )
        optimizer.clipped = [self._unpack_clipped(each) for each in found["clipped"]]
        optimizer.go_on()
        for chunk in optimizer.chunks:
            chunk.version = self._tiered.version_of(chunk.block)
        if [chunk["pieces"].keys() for chunk in found["chunks"].values()] == [
            {piece.key for piece in chunk.pieces} for chunk in optimizer.chunks
        ]:
            for chunk, as_stored in zip(optimizer.chunks, found["chunks"].values(), strict=True):
                chunk.blocks = list(as_stored["blocks"])
                for piece in chunk.pieces:
                    chunk.tensors[piece] = dict(as_stored["pieces"][piece.key]["tensors"])
                    chunk.values[piece] = self._unpack(as_stored["pieces"][piece.key]["values"])
            return
        log.info("optimizer %r: its state is cut into chunks of another size than in the commit", optimizer.name)
        for block in dict.fromkeys(chunk.block for chunk in optimizer.chunks):
            places: list[Stored] = []
            values: dict[Weight, dict[str, Any]] = {}
            for as_stored, key, part in stored:
                if part is not None and part.weight.block is block:
                    values.setdefault(part.weight, self._unpack(as_stored["pieces"][key]["values"]))
                    tensors = as_stored["pieces"][key]["tensors"]
                    places += [Stored(name, f"{state}.{key}", state, part) for state, name in tensors.items()]
            optimizer.take_over(block, places, values)

    def resume(self, objects: Mapping[str, Any]) -> Any:
        """See `Tiered.resume`."""
        for name, each in objects.items():
            if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
                remedy = "give an object that has both, or keep the value in the commit's metadata"
                raise TrainingError(f"{name!r} has no state_dict() and load_state_dict()", have=type(each).__name__, remedy=remedy)
        if not objects and any(getattr(optimizer.step, "_wrapped_by_lr_sched", False) for optimizer in self._tiered.optimizers):
            log.warning("a learning-rate schedule was not given to tiered.resume(): it is in no commit, and begins anew in the next run")
        if self._stepped:
            remedy = "call it once, right before the loop: schedules and random numbers would be set back in the middle of it"
            raise TrainingError("resume() after a step", remedy=remedy)
        self._objects.update(objects)
        self._resumed = True
        if not self._found:
            return None
        stored = self._found["objects"]
        if stored.keys() != objects.keys():
            have = ", ".join(sorted(stored)) or "none"
            need = ", ".join(sorted(objects)) or "none"
            raise TrainingError("the commit has the state of other objects", need=need, have=have, remedy="give resume() the same objects")
        for optimizer in self._tiered.optimizers:
            found = self._found["optimizers"].get(optimizer.name)
            if found is not None:
                if len(found["groups"]) != len(optimizer.param_groups):
                    raise TrainingError(
                        f"optimizer {optimizer.name!r} has other groups than in the commit",
                        need=f"{len(found['groups'])} groups",
                        have=f"{len(optimizer.param_groups)} groups",
                        remedy="give params= as it was for the commit",
                    )
                with damaged_unless_sound():
                    for group, packed in zip(optimizer.param_groups, found["groups"], strict=True):
                        group.update({key: value for key, value in self._unpack(packed).items() if key != "params"})
                    optimizer.attributes.update(self._unpack(found.get("attributes", {})))
        for name, each in objects.items():
            each.load_state_dict(self._unpack(stored[name]))
        numbers = self._found["random"]
        with damaged_unless_sound():
            random.setstate(self._unpack(numbers["python"]))
            np.random.set_state(self._unpack(numbers["numpy"]))
            torch.set_rng_state(self._unpack(numbers["torch"]))
            if numbers["cuda"] is not None and self._tiered.device.type == "cuda":
                torch.cuda.set_rng_state(self._unpack(numbers["cuda"]), self._tiered.device)
        committed = self._tiered.store.committed
        log.info("going on from generation %s", committed.generation if committed is not None else "?")
        if committed is None or committed.metadata is None:
            log.warning("the commit has no metadata: where the loop was in its data is not known. Give some, as in commit({'step': step})")
            return {}
        return committed.metadata

    def warn_unless_resumed(self) -> None:
        """A step is taken: whoever goes on from a commit has said so by now."""
        self._stepped = True
        if self._found and not self._resumed and not self._warned:
            self._warned = True
            log.warning("the store held a commit, but tiered.resume() was not called: schedules and random numbers begin anew")
