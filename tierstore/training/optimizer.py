"""`TieredOptimizer`: any optimizer class over a model in a store, chunk by chunk.

[Note: When weights are updated]
`step` updates every block when `step()` is called. `deferred` notes there what is to be done, and each block is updated just before its
next use, while later layers still wait for theirs: the norm is known by then, so clipping stays exact. `backward` updates a block as
soon as its gradients are complete, so they are never stored; it cannot know a norm over all of them, nor whether another backward pass
is to follow. All three give the same bits.

[Note: Updates between micro-batches]
With `backward`, nothing computes while the links bring a layer's state and take it away. So where layers run in micro-batches and their
weights are not held on the device, a layer's update is put off until the next one's backward pass, and made a few chunks at a time, behind
each of its micro-batches. The gradients wait in torch's memory until then. What is left when that layer is done, or at the end of the
backward pass, or when somebody asks for the weights, is made at once; so is all of it where the device has no room for both layers.

[Note: Updates in the next forward pass]
With `backward`, links have nothing to do in forward passes once the room on the device is full of what the next backward pass begins with.
Of `deferred_layers`, evenly spread among all, the update waits for the layer's next forward pass instead, its gradients in torch's memory.
More than the forward pass can hide only makes it wait: a third of the layers where each way of the link needs about as long as all
computing does. Where layers run in micro-batches and their weights stream, there is no room for all of a layer's state at once: its
chunks are updated one by one behind the micro-batches of the layers since the last one that had waited, of those that this optimizer
updates. The last layer is not among those that wait, unless they are more than half: its gradients would lie beside what all other layers
keep for their backward pass.

[Note: Hyper-parameters of a step]
A schedule moves on, and `zero_grad()` is called, before a deferred update is carried out. So `step()` takes a snapshot of every option of
every group, and of the clip coefficients; and `zero_grad()` takes gradients that are still to be used away from the parameters, but does
not erase them.

[Note: Room for an update]
An update leases weights, then gradients, then state. What is leased stays where it is, and an extent is one piece: the weights may part
the rest of the device in two, and the gradients that in three. So there is certainly room only if the largest of two equal parts holds
the gradients, and the largest of three the state, in whole pages.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tierstore.catalog import PAGE, extent_bytes
from tierstore.errors import CapacityError, DeadlockError, OptionError, TrainingError
from tierstore.training.chunks import ALIGN, MASTER, PREFIX, Chunk, Stepper, cut, even_share
from tierstore.training.gradients import Observe, Part, Sums, part_bytes
from tierstore.training.instances import Factory, Hyper, Rehearsal, in_group, may_change, own_options
from tierstore.training.layers import Tiered
from tierstore.training.leasing import chunk_bytes, rounded
from tierstore.training.norms import clip_coefficient, norms_of, total_norm
from tierstore.training.parameters import grouped
from tierstore.training.pieces import Piece, Stored, gather
from tierstore.training.probe import MAX_NDIM, PLAIN, SHAPES, Kind, same
from tierstore.training.rules import Rules, resolved_implementation, rules_of
from tierstore.training.structure import Unit, Weight, WeightBlock
from tierstore.training.surroundings import Autocast

log = logging.getLogger("tierstore")

Scope = Literal["global", "layer"]
Coefficient = Tensor | dict[Weight, Tensor]


@dataclass(eq=False, slots=True)
class Job:
    """An update of one block that is to be carried out.

    Attributes:
        hyper: Options and attributes.
        coefficients: Clip coefficients, in the order in which to multiply by them.
        gradients: Which weights have a gradient, by part.
        autocast: As it was when `step()` was called: a deferred update is carried out in the middle of a forward pass.
        detached: `zero_grad()` was called since: the gradients are this job's own, and spent by it.
        begun: Chunks that the optimizer has begun to update: whether or not it came to an end, it is not to do so twice.
        failed: An attempt at it has failed.
        torn: An attempt at it has left the block of weights without content; all of it is in the masters.
        given: The gradients, where they are not in the store.
        spread: It is to be made behind the micro-batches of another layer; see [Note: Updates between micro-batches] and
            [Note: Updates in the next forward pass].
    """

    hyper: Hyper
    coefficients: list[Coefficient]
    gradients: dict[Part, set[Weight]]
    autocast: Autocast
    detached: bool = False
    begun: set[Chunk] = field(default_factory=set)
    failed: bool = False
    torn: bool = False
    given: Sums | None = None
    spread: bool = False

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Update as in `step()`, whatever the forward pass that it comes before is run under.

        Autocast would round what an optimizer multiplies; inference mode would make tensors that no later step may change.
        """
        with torch.inference_mode(False), torch.no_grad(), self.autocast.again():
            yield


@dataclass(frozen=True, slots=True)
class _Needs:
    """What to lease, and how; see `Buffers.lease`."""

    names: list[str]
    write: list[str]
    spent: list[str]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What is updated behind the micro-batches of a layer's forward pass.

    Attributes:
        blocks: Of a later layer.
        place: Of this layer among those behind whose micro-batches that is done.
        count: How many these are.
    """

    blocks: set[WeightBlock]
    place: int
    count: int


class TieredOptimizer(torch.optim.Optimizer):
    """Drives an optimizer class over the parameters of an attached model.

        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=3e-4)

    It is a `torch.optim.Optimizer`: learning-rate schedulers and `param_groups` work. Weights, gradients and state are leased a chunk at a
    time; with everything resident, one instance of the class gives the same bits.

    Args:
        tiered: What `attach` returned.
        factory: An optimizer class, or a function of (params, **options) that returns an optimizer, that treats parameters separately.
        params: None: every trainable parameter. Otherwise names, patterns of names or parameters, or group dicts with such as "params".
        master_dtype: Keep copies of the weights in this dtype: gradients are widened to it, these are updated, and narrowed into the
            weights.
        when: "step", "deferred" or "backward"; see [Note: When weights are updated].
        deferred_layers: With "backward", of so many layers the update is made in the next forward pass, when the links rest: that takes the
            gradients of as many layers on the device, beside the store's budget.
        where: "device".
        name: Under which its state is kept in the store; by default its number among the model's optimizers.
        options: Of the factory.

    Raises:
        OptionError: An argument is not understood, or `factory` cannot work.
        TrainingError: Another optimizer has one of the parameters.
        CapacityError: A parameter is too large for the device, and the class cannot take it in pieces.
    """

    def __init__(
        self,
        tiered: Tiered,
        factory: Factory,
        *,
        params: Iterable[Any] | None = None,
        master_dtype: torch.dtype | None = None,
        when: Literal["step", "deferred", "backward"] = "step",
        deferred_layers: int = 0,
        where: Literal["device"] = "device",
        name: str | None = None,
        **options: Any,
    ) -> None:
        """See the class."""
        if not hasattr(tiered, "_check_attached"):
            raise OptionError(
                "tiered= is not understood",
                need="what attach() returned",
                have=type(tiered).__name__,
                remedy="first tiered = attach(model, store), then TieredOptimizer(tiered, ...)",
            )
        if isinstance(factory, torch.optim.Optimizer):
            raise OptionError(
                "factory= is an optimizer already",
                need="its class, since state is made and kept a chunk at a time",
                have=f"a {type(factory).__name__}",
                remedy="give the class, and its options to TieredOptimizer: TieredOptimizer(tiered, torch.optim.AdamW, lr=3e-4)",
            )
        if when not in ("step", "deferred", "backward"):
            raise OptionError(
                "when= is not understood", need="'step', 'deferred' or 'backward'", have=repr(when), remedy="give one of these"
            )
        if isinstance(deferred_layers, bool) or not isinstance(deferred_layers, int) or deferred_layers < 0:
            raise OptionError(
                "deferred_layers= is not understood", need="a number of layers", have=repr(deferred_layers), remedy="give one"
            )
        if deferred_layers and when != "backward":
            raise OptionError(
                "deferred_layers= says which updates of when='backward' wait",
                have=f"when={when!r}",
                remedy="give when='backward' as well, or leave it out: 'deferred' has all of them wait",
            )
        if where != "device":
            raise OptionError(
                "where= is not understood", need="'device'", have=repr(where), remedy="leave it out: updates run on the device"
            )
        tiered._check_attached()
        self.tiered = tiered
        self.when = when
        self.master_dtype = master_dtype
        self.name = name if name is not None else str(len(tiered.optimizers))
        if any(other.name == self.name for other in tiered.optimizers):
            raise OptionError(f"two optimizers named {self.name!r}", remedy="give each a name= of its own")
        groups, weights = grouped(tiered, params)
        for weight in weights:
            other = next((other for other in tiered.optimizers if weight in other._weights), None)
            if other is not None:
                raise TrainingError(f"parameter {weight.name!r} belongs to another optimizer", remedy="give each its own params=")
        factories = [in_group(factory, {key: value for key, value in group.items() if key != "params"}) for group in groups]
        kinds = dict.fromkeys((group, master_dtype or weight.dtype) for weight, group in weights.items())
        self._rules: dict[tuple[int, torch.dtype], Rules] = {
            (group, dtype): rules_of(factories[group], options, dtype, tiered.device) for group, dtype in kinds
        }
        self._writes_gradients = any(rules.writes_gradients for rules in self._rules.values())
        likes = [torch.empty(0, dtype=master_dtype or weight.dtype, device=tiered.device) for weight in weights]
        self._implementation = resolved_implementation(factory, options, likes)
        self._weights: dict[Weight, int] = weights
        self._check_accepted(factory_name(factory), weights)
        like = next(iter(weights))
        sample = torch.zeros([1] * len(like.shape), dtype=master_dtype or like.dtype, device=tiered.device)
        made = factory([sample], **options)
        super().__init__(groups, made.defaults)
        options = {**options, **self._implementation}
        begun = {group for (group, _), rules in self._rules.items() if rules.state_at_construction}
        self._stepper = Stepper(tiered.buffers, factories, options, master_dtype, factory_name(factory), begun)
        self._rehearsal = Rehearsal(factories, options, self._samples()) if may_change(made) else None
        self._attributes: dict[str, Any] = {}
        self._coefficients: list[Coefficient] = []
        self._norms: dict[Weight, Tensor] = {}
        self._norm_type: float | None = None
        self._pending: dict[WeightBlock, Job] = {}
        self._updated: set[WeightBlock] = set()
        self._taken: Hyper | None = None  # what these were updated with
        self._unerased = False  # plain torch would still have the gradients of the last step
        self._stepped: set[int] = set()  # groups that had gradients since the last step()
        self._chunks: dict[WeightBlock, list[Chunk]] = {}
        self._late: set[WeightBlock] = set()
        self._ahead: dict[Unit, _Ahead] = {}
        self._spread_evenly(deferred_layers)
        tiered.finish()  # what other optimizers have put off is for gradients in the pieces in which they are
        self._cut()
        tiered.state.restore_optimizer(self)
        tiered.optimizers.append(self)

    def _spread_evenly(self, count: int) -> None:
        """Choose so many of the layers: what each alone has of these parameters waits."""
        structure = self.tiered.structure
        used = Counter(block for unit in structure.units for block in unit.blocks)
        mine = {weight.block for weight in self._weights}
        own = {unit: {block for block in unit.blocks if used[block] == 1 and block in mine} for unit in structure.layers}
        layers = [unit for unit, blocks in own.items() if blocks]
        if count > len(layers):
            raise OptionError(
                "deferred_layers= is more than there are",
                need=f"at most {len(layers)}: layers that have parameters of this optimizer, and to themselves",
                have=str(count),
                remedy="give fewer",
            )
        begin = 0
        for number in range(count):
            spacing = len(layers) // count
            end = (number + 1) * len(layers) // count - 1 - (max(1, spacing // 4) if spacing > 1 else 0)
            blocks = own[layers[end]]
            self._late |= blocks
            for place, unit in enumerate(layers[begin:end]):
                self._ahead[unit] = _Ahead(blocks, place, end - begin)
            begin = end + 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For torch, while this is made. Afterwards groups are as they are: where state and gradients lie depends on them.

        Raises:
            OptionError: It was made already.
        """
        if hasattr(self, "_stepper"):
            remedy = "give all groups as params=, with lr=0 for what is to be trained later; or make a second TieredOptimizer"
            raise OptionError("add_param_group() after the optimizer was made", remedy=remedy)
        super().add_param_group(param_group)

    def _check_accepted(self, name: str, weights: Mapping[Weight, int]) -> None:
        """Refuse parameters that the class does not take, or not beside one another.

        Args:
            name: Of the class.
            weights: All, with the numbers of their groups.
        """
        dtypes: dict[int, torch.dtype] = {}
        for weight, group in weights.items():
            dtype = self.master_dtype or weight.dtype
            rules = self._rules_for(weight)
            first = dtypes.setdefault(group, dtype)
            if dtype != first and not rules.mixed_dtypes:
                raise OptionError(
                    f"{name} takes its epsilon from the dtype of a group's first parameter",
                    need="parameters of one dtype in each group, or an epsilon",
                    have=f"{first} and {dtype} in group {group}",
                    remedy="give eps= in numbers, or put parameters of another dtype into a group of their own",
                    optimizer=name,
                )
            if not rules.accepts(weight.shape):
                raise OptionError(
                    f"{name} does not take parameter {weight.name!r}",
                    need=f"parameters of {' or '.join(map(str, sorted(rules.ndims)))} dimensions",
                    have=f"one of shape {tuple(weight.shape)}",
                    remedy="name those that it takes in params=, and give the rest to another optimizer",
                    optimizer=name,
                )

    def __repr__(self) -> str:
        return f"<TieredOptimizer {self.class_name}: {len(self._weights)} parameters, updated in {self.when!r}>"

    @property
    def class_name(self) -> str:
        """Of the optimizer that is driven."""
        return self._stepper.name

    # -- chunks ----------------------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Decide on chunks, and have gradients come in the same pieces."""
        device_bytes = self.tiered.buffers.device_bytes
        blocks = list(dict.fromkeys(weight.block for weight in self._weights))
        self._check_fit(blocks, device_bytes)
        share = self._share(blocks, device_bytes)
        for block in blocks:
            self._chunks[block] = chunks = self._cut_block(block, self._limit(device_bytes), share)
            self.tiered.cut_gradients(block, self, [chunk.pieces for chunk in chunks])

    def _limit(self, device_bytes: int) -> int:
        """The most that a chunk is to take."""
        return chunk_bytes(device_bytes, self.tiered.buffers.ram_bytes)

    def _share(self, blocks: Collection[WeightBlock], device_bytes: int) -> float:
        """What a chunk is to take."""
        sizes = dict.fromkeys(blocks, 0.0)
        each = {weight: self._bytes_per_element(weight) for weight in self._weights}
        for weight in self._weights:
            sizes[weight.block] += weight.numel * each[weight]
        return even_share(sizes.values(), self._limit(device_bytes), ALIGN * max(each.values()))

    def _cut_block(self, block: WeightBlock, limit: int, share: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        for group in range(len(self.param_groups)):
            mine = {weight for weight, number in self._weights.items() if number == group and weight.block is block}
            if not mine:
                continue
            ranges = {weight for weight in mine if self._rules_for(weight).may_cut(weight.shape)}
            for pieces in cut(block, mine, self._bytes_per_element, limit, ranges=ranges, share_bytes=share):
                chunks.append(Chunk(f"{PREFIX}{self.name}/{block.name}/{len(chunks)}", block, pieces, group))
        return chunks

    def _rules_for(self, weight: Weight) -> Rules:
        return self._rules[self._weights[weight], self.master_dtype or weight.dtype]

    def _bytes_per_element(self, weight: Weight) -> float:
        dtype = self.master_dtype or weight.dtype
        own = dtype.itemsize if self.master_dtype is not None else 0
        return max(self._rules_for(weight).state_bytes_per_element + own, weight.dtype.itemsize)

    def _check_fit(self, blocks: Collection[WeightBlock], device_bytes: int) -> None:
        """Refuse what an update could not lease. See [Note: Room for an update].

        Raises:
            CapacityError: With what would do: on a larger device chunks are larger, and need more.
        """

        def largest(device_bytes: int) -> Chunk:
            limit, share = self._limit(device_bytes), self._share(blocks, device_bytes)
            return max((chunk for block in blocks for chunk in self._cut_block(block, limit, share)), key=self._need)

        chunk = largest(device_bytes)
        enough = self._need(chunk)
        if enough <= device_bytes:
            return
        while (need := self._need(largest(enough))) > enough:
            enough = need
        weight = max(chunk.pieces, key=lambda piece: piece.numel).weight
        remedy = "raise gpu=, or name smaller modules in layers="
        if not self._rules_for(weight).may_cut(weight.shape):
            fused = bool(self.param_groups[self._weights[weight]].get("fused"))
            other = "fused=False, with which it may be cut" if fused else "an optimizer that is elementwise (AdamW is)"
            remedy = f"raise gpu=, name smaller modules in layers=, or use {other}"
        raise CapacityError(
            f"an update by {self._stepper.name} of {weight.name!r} does not fit the device",
            need=f"{enough} bytes: {self.tiered.buffers.bytes_of(chunk.block.name)} of weights of {chunk.block.name!r}, and wherever these "
            "lie, room for a piece of gradient and state",
            have=f"{device_bytes} bytes",
            remedy=remedy,
            block=chunk.block.name,
        )

    def _need(self, chunk: Chunk) -> int:
        """Bytes of the device with which an update of a chunk certainly finds room."""
        weights = self.tiered.buffers.bytes_of(chunk.block.name)
        part = part_bytes(chunk.pieces)
        gradient = 0 if self.when == "backward" else part
        state = extent_bytes(size for piece in chunk.pieces for size in self._state_sizes(piece))
        state = state and rounded(state, part)
        need = weights + max(0, 2 * gradient - PAGE)
        if state:
            need = max(need, weights + gradient + max(0, (3 if gradient else 2) * (state - PAGE)) + PAGE)
        return need

    def _state_sizes(self, piece: Piece) -> list[int]:
        """Bytes of the tensors that hold the state of a piece, master included, at most."""
        dtype = self.master_dtype or piece.weight.dtype
        rules = self._rules_for(piece.weight)
        sizes = [piece.numel * dtype.itemsize] if self.master_dtype is not None else []
        own = rules.state_bytes(piece.shape)
        total = own if own is not None else int(piece.numel * rules.state_bytes_per_element)
        count = sum(entry.ndim == min(len(piece.shape), MAX_NDIM) and entry.kind in (Kind.SAME, Kind.OTHER) for entry in rules.entries)
        return sizes + [-(-total // count)] * count if count else sizes

    def refresh_parts(self, block: WeightBlock) -> None:
        """The gradients of a block were cut anew: find those of each chunk."""
        for chunk in self._chunks.get(block, ()):
            chunk.part = next(part for part in self.tiered.gradients.of[block].parts if part.pieces == chunk.pieces)

    # -- what the backward pass asks ---------------------------------------------------------------------------------------

    def takes(self, block: WeightBlock) -> bool:
        """Whether gradients are used up as soon as they are complete."""
        return self.when == "backward" and block in self._chunks

    def take_gradients(self, block: WeightBlock, sums: Sums, *, spread: bool = False) -> Sums:
        """Update a block with its gradients. Returns those of others.

        Args:
            block: Which.
            sums: The gradients, complete.
            spread: Do so behind the micro-batches of the next layer. See [Note: Updates between micro-batches].

        Raises:
            TrainingError: It was updated already since the last `step()`, or `zero_grad()` was not called since.
        """
        mine = {weight: grad for weight, grad in sums.items() if weight in self._weights}
        if not mine:
            return sums
        if block in self._updated:
            raise TrainingError(
                "a second backward pass before step(): with when='backward' the weights are updated already",
                remedy="use when='deferred' to accumulate gradients over several backward passes",
            )
        if self._unerased:
            raise TrainingError(
                "a backward pass after step() without zero_grad(): with when='backward' there is nothing to add to",
                need="zero_grad() between a step and the next backward pass",
                remedy="call it, or use when='deferred' to accumulate gradients",
            )
        self._updated.add(block)
        self._stepped.update(self._weights[weight] for weight in mine)
        self._taken = self._snapshot()
        job = Job(self._taken, [], {}, Autocast.off(self.tiered.device.type), given=mine, spread=spread)
        if spread or block in self._late:
            self._put_off(block, job)
        else:
            self._run(block, job)
        return {weight: grad for weight, grad in sums.items() if weight not in mine}

    def make_share(self, shares: int) -> None:
        """Make a part of the updates that are spread: one of so many shares of what is left. On the thread of a backward pass."""

        def share(block: WeightBlock, left: int) -> int:
            return 0 if block in self._late else -(-left // shares)

        self._make_shares(share)

    def make_share_ahead(self, unit: Unit, done: int, count: int) -> None:
        """The same in a forward pass, of what waits for a later layer's turn. See [Note: Updates in the next forward pass].

        Args:
            unit: The layer that runs.
            done: Micro-batches of it that have been queued.
            count: How many it has.
        """
        ahead = self._ahead.get(unit) if self._pending else None
        if ahead is None:
            return

        def share(block: WeightBlock, left: int) -> int:
            if block not in ahead.blocks:
                return 0
            shares = ahead.count * count
            still = shares - ahead.place * count - done
            return left - len(self._chunks[block]) * still // shares

        self._make_shares(share)

    def _make_shares(self, share: Callable[[WeightBlock, int], int]) -> None:
        """Of updates that are spread, make as many chunks as `share` says, which is told how many are left.

        Whoever else is just settling makes them, or has their room; this thread holds a lease, and must not wait for him.
        """
        spread = [(block, job) for block, job in list(self._pending.items()) if job.spread]
        if not spread or not self.tiered.settling.acquire(blocking=False):
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                for block, job in spread:
                    if self._pending.get(block) is job:
                        left = self._left(block, job)
                        wanted = share(block, len(left))
                        if wanted > 0:
                            self._make_share_of(block, job, left, wanted)
        finally:
            self.tiered.settling.release()

    def catch_up(self) -> None:
        """Make all that is left of the updates whose gradients wait outside of the store."""
        waiting = [block for block, job in list(self._pending.items()) if job.given is not None and block not in self._late]
        if waiting:
            self.settle(waiting)

    def _make_share_of(self, block: WeightBlock, job: Job, left: Sequence[tuple[Chunk, set[Weight]]], count: int) -> None:
        try:
            if count < len(left):
                self._run(block, job, count)
                needed = set().union(*(weights for _, weights in left[count:]))
                job.given = {weight: gradient for weight, gradient in (job.given or {}).items() if weight in needed}
            else:
                self._settle([block])
        except (CapacityError, DeadlockError):  # beside the layer that runs there is no room: at its end
            job.spread = False

    def before_adding(self, block: WeightBlock) -> None:
        """Gradients are about to be added to those of a block: what is pending for them comes first, and so does clipping."""
        if block in self._pending:
            self.settle([block])
        if self._coefficients:
            self._clip_in_place()

    def observer(self, block: WeightBlock) -> Observe | None:
        """What is to be shown the totals of a block's gradients; None: nothing."""
        if block not in self._chunks:
            return None
        if self._norm_type is None:
            self._norms.clear()
            return None

        def observe(totals: Sums) -> None:
            if self._norm_type is not None:
                mine = {weight: total for weight, total in totals.items() if weight in self._weights}
                norms = norms_of(list(mine.values()), self._norm_type, self.master_dtype)
                self._norms.update(zip(mine, norms, strict=True))

        return observe

    # -- the loop's calls --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, now or, with `when="deferred"`, before its next use.

        Raises:
            OptionError: A closure was given.
            TrainingError: With `when="backward"`, options were changed since the backward pass, which has made the updates.
            TierstoreError: An update failed; blocks before it are updated, those behind it are not.
        """
        if closure is not None:
            raise OptionError("step() takes no closure", remedy="compute the loss before it, and use an optimizer that needs no closure")
        self.tiered._check_attached()
        self.tiered.state.warn_unless_resumed()
        self._finish([block for block in list(self._pending) if block not in self._late])
        hyper = self._snapshot()
        if self._updated:
            self._check_as_taken(hyper)
            self._unerased = True
        autocast = Autocast.now(self.tiered.device.type)
        coefficients = list(self._coefficients)
        self._norms.clear()
        self._updated.clear()
        jobs: dict[WeightBlock, Job] = {}
        for block, chunks in self._chunks.items():
            found: dict[Part, set[Weight]] = {}
            for chunk in chunks:
                if chunk.part is not None and chunk.part.present:
                    found[chunk.part] = set(chunk.part.present)
                    self._stepped.add(chunk.group)
            if found:
                jobs[block] = Job(hyper, coefficients, found, autocast)
        self._rehearse(hyper)
        self._stepped.clear()
        for block, job in jobs.items():
            if self.when == "step":
                self._run(block, job)
            else:
                self._put_off(block, job)
        if self.master_dtype is not None:  # what was stored is not clipped, nor is it for the next step
            self._coefficients = []

    def _check_as_taken(self, hyper: Hyper) -> None:
        """Refuse options that come too late. Of those in tensors nothing is said: a device would be waited for."""
        assert self._taken is not None
        for number, (taken, now) in enumerate(zip(self._taken.options, hyper.options, strict=True)):
            for key, value in now.items():
                if isinstance(value, (*PLAIN, tuple)) and not same(value, taken.get(key)):
                    raise TrainingError(
                        f"{key!r} of group {number} was changed between the backward pass and step()",
                        need=f"{taken.get(key)!r}, with which the weights were updated in the backward pass",
                        have=repr(value),
                        remedy="with when='backward' change options before backward(), or behind step(); or use when='deferred'",
                    )

    def _put_off(self, block: WeightBlock, job: Job) -> None:
        self._pending[block] = job
        # Weakly: the engine lives as long as its thread does, and is ended when nobody has the store any more.
        self.tiered.store.engine.unsettled[block.name] = functools.partial(_settle, weakref.ref(self.tiered), block)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Have no gradients. Those that a pending update needs are kept for it alone."""
        if not set_to_none:
            raise OptionError("zero_grad(set_to_none=False) would store zeros", remedy="leave set_to_none out")
        self._coefficients = []
        self._norms.clear()
        self._unerased = False
        self.tiered.erase_unfinished()
        for block, chunks in self._chunks.items():
            total = self.tiered.gradients.of[block]
            job = self._pending.get(block)
            kept: set[Part] = set()
            if job is not None and not job.detached:
                job.detached = True
            if job is not None:
                kept = set(job.gradients)
            for chunk in chunks:
                if chunk.part in kept:
                    chunk.part.present = set()
                elif chunk.part is not None:
                    total.erase_part(chunk.part)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, *, scope: Scope = "global"
    ) -> Tensor:
        """Scale the gradients so that their norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        The norm is that of the norms of the parameters, in the order of `model.parameters()`; with masters, of widened gradients.

        Args:
            max_norm: The largest norm.
            norm_type: Of the p-norm; may be infinite.
            error_if_nonfinite: Raise if the norm is not finite, and change nothing.
            scope: "global", or "layer": each layer, each module beside the layers, and what a module above layers owns itself, by its
                own norm.

        Returns:
            The norm before, on the device; with scope="layer" that of each group, 0 where it has no gradient, in the order of their
            parameters.

        Raises:
            OptionError: With `when="backward"`, where weights are updated before all gradients are known.
            RuntimeError: `error_if_nonfinite`.
        """
        if self.when == "backward":
            remedy = "use when='deferred', which overlaps as much"
            raise OptionError("when='backward' updates weights before any norm over all gradients is known", remedy=remedy)
        if scope not in ("global", "layer"):
            raise OptionError("scope= is not understood", need="'global' or 'layer'", have=repr(scope), remedy="give one of these")
        norm_type = float(norm_type)
        if self._coefficients:
            self._clip_in_place()
        if self._norm_type != norm_type:
            self._norms.clear()
            self._norm_type = norm_type
        norms = {
            weight: norm for weight in sorted(self._weights, key=lambda weight: weight.index) if (norm := self._norm_of(weight)) is not None
        }
        if not norms and scope == "global":
            return torch.tensor(0.0)
        if scope == "global":
            total = total_norm(list(norms.values()), norm_type)
            self._refuse_nonfinite(total, norm_type, error_if_nonfinite)
            self._coefficients.append(clip_coefficient(total, max_norm))
            return total
        groups = [[weight for weight in group if weight in self._weights] for group in self.tiered.structure.groups]
        groups = [group for group in groups if group]
        totals = [total_norm([norms[weight] for weight in group if weight in norms], norm_type) for group in groups]
        stacked = torch.stack([total.to(self.tiered.device) for total in totals])
        self._refuse_nonfinite(stacked, norm_type, error_if_nonfinite)
        coefficients = [clip_coefficient(total, max_norm) for total in totals]
        self._coefficients.append({weight: each for group, each in zip(groups, coefficients, strict=True) for weight in group})
        return stacked

    @staticmethod
    def _refuse_nonfinite(total: Tensor, norm_type: float, wanted: bool) -> None:
        if wanted and not bool(torch.isfinite(total).all()):
            raise RuntimeError(f"the {norm_type} norm of the gradients is not finite, so they cannot be clipped")

    # -- carrying out ------------------------------------------------------------------------------------------------------

    def settle(self, blocks: Collection[WeightBlock]) -> None:
        """Carry out what is pending for these blocks."""
        if not self._pending:
            return
        # Any thread may come by that commits or reads: each update is made once. New state is to be changed by later steps.
        with self.tiered.settling, torch.inference_mode(False), torch.no_grad():
            self._settle(blocks)

    def _settle(self, blocks: Collection[WeightBlock]) -> None:
        for block in blocks:
            job = self._pending.get(block)
            if job is not None:
                self._run(block, job)
                self._pending.pop(block, None)
                if not any(block in other._pending for other in self.tiered.optimizers):
                    self.tiered.store.engine.unsettled.pop(block.name, None)

    def finish(self) -> None:
        """Carry out all that is pending, and have all state in the store."""
        self._finish(list(self._pending))

    def _finish(self, blocks: Collection[WeightBlock]) -> None:
        self.settle(blocks)
        for chunk in self.chunks:
            self._stepper.keep(chunk)

    def _run(self, block: WeightBlock, job: Job, count: int | None = None) -> None:
        """Update one block.

        Args:
            block: Which.
            job: With what.
            count: Of chunks that are left; None: all.
        """
        try:
            with job.surroundings():
                self._update(block, job, count)
        except BaseException:
            if job.torn and block not in self._pending:  # nobody may see the weights before they are whole
                job.begun.update(self._chunks[block])
                job.given = None
                self._put_off(block, job)
            raise
        if job.detached and job.failed:
            self.tiered.buffers.give_up([part.name for part in job.gradients if not part.present])

    def _snapshot(self) -> Hyper:
        """The options of all groups, now. Which implementation is not left to each chunk: it would choose by what it has of a group."""
        options = [
            {
                **own_options({key: value for key, value in group.items() if key not in ("params", "param_names")}),
                **(self._implementation if group.get("foreach") is None and group.get("fused") is None else {}),
            }
            for group in self.param_groups
        ]
        return Hyper(options, own_options(self._attributes))

    def _samples(self) -> list[Tensor]:
        """By group: a parameter of a shape that the class was seen to take."""
        firsts = {group: weight for weight, group in reversed(self._weights.items())}
        return [
            torch.ones(
                next(shape for shape in SHAPES if len(shape) == min(len(weight.shape), MAX_NDIM)),
                dtype=self.master_dtype or weight.dtype,
                device=self.tiered.device,
            )
            for _, weight in sorted(firsts.items(), key=lambda item: item[0])
        ]

    def _rehearse(self, hyper: Hyper) -> None:
        """Have options and attributes as the step will leave them. See `instances`, [Note: What steps change beside parameters]."""
        if self._rehearsal is None:
            return
        changed = self._rehearsal.step(hyper, self._stepped)
        self._attributes.update(changed.attributes)
        for group, options in zip(self.param_groups, changed.options, strict=True):
            for key, value in options.items():
                before = group.get(key)
                if isinstance(before, Tensor) and isinstance(value, Tensor) and (before.shape, before.dtype) == (value.shape, value.dtype):
                    before.copy_(value)  # others may hold it
                else:
                    group[key] = value

    def go_on(self) -> None:
        """What it has is of steps taken before."""
        if self._rehearsal is not None:
            self._rehearsal.go_on()

    def _left(self, block: WeightBlock, job: Job) -> list[tuple[Chunk, set[Weight]]]:
        """Chunks that are still to be updated, each with those of its weights that have a gradient."""
        left: list[tuple[Chunk, set[Weight]]] = []
        for chunk in self._chunks[block]:
            if chunk in job.begun:
                continue
            if job.given is not None:
                weights = set(chunk.weights.intersection(job.given))
            else:
                weights = job.gradients.get(chunk.part, set()) if chunk.part is not None else set()
            if weights:
                left.append((chunk, weights))
        return left

    def _update(self, block: WeightBlock, job: Job, count: int | None) -> None:
        todo = self._left(block, job)[:count]
        if not todo and not job.torn:
            return
        chunks = self._chunks[block]
        before = self.tiered.version_of(block)
        written = [chunk for chunk in chunks if chunk.version not in (None, before)] if self.master_dtype is not None else []
        covered = {weight for chunk, _ in todo for weight in chunk.weights}
        overwritten = job.torn or (
            self.master_dtype is not None
            and not written
            and all(chunk.has_masters for chunk, _ in todo)
            and covered == set(block.weights)
            and len(todo) == len(chunks)
        )
        torn, job.torn = job.torn, overwritten
        failure: BaseException | None = None
        # One lease of a block and of all there is to its only chunk costs half as much as two. But a fresh lease must not be left by an
        # exception, by which alone what is spent keeps its content.
        single = len(todo) == 1 and not (overwritten and job.detached)
        together = self._needs(todo[0][0], job) if single else _Needs([], [], [])
        names, write = [block.name, *together.names], [block.name, *together.write]
        fresh = [block.name] if overwritten else []
        try:
            with self.tiered.buffers.lease_all(names, write=write, fresh=fresh, spent=together.spent) as leased:
                values = leased[block.name]
                try:
                    for chunk, weights in todo:
                        if single:
                            self._update_chunk(chunk, weights, values, leased, job, written=chunk in written)
                        else:
                            needs = self._needs(chunk, job)
                            with self.tiered.buffers.lease_all(needs.names, write=needs.write, spent=needs.spent) as of_chunk:
                                self._update_chunk(chunk, weights, values, of_chunk, job, written=chunk in written)
                            self._stepper.keep(chunk)
                        if overwritten and len(weights) < len(chunk.weights):
                            self._rewrite([chunk], values)
                    if torn:
                        self._rewrite(chunks, values)
                except BaseException as error:
                    job.failed = True
                    if not overwritten:
                        raise
                    self._rewrite(chunks, values)
                    failure = error  # raised outside: what leaves a fresh lease by an exception has no content
        finally:
            after = self.tiered.version_of(block)
            stepped = {chunk for chunk, _ in todo} & job.begun
            for chunk in chunks:
                if chunk not in written or chunk in stepped:
                    chunk.version = after
        job.torn = False
        if failure is not None:
            raise failure
        if single:
            try:
                self._stepper.keep(todo[0][0])
            except BaseException:
                job.failed = True
                raise

    @staticmethod
    def _needs(chunk: Chunk, job: Job) -> _Needs:
        """What to lease for a chunk, beside its weights."""
        names, write, spent = list(chunk.blocks), list(chunk.blocks), []
        if job.given is None:
            assert chunk.part is not None
            names.append(chunk.part.name)
            if job.detached:
                write.append(chunk.part.name)
                spent.append(chunk.part.name)
        return _Needs(names, write, spent)

    def _update_chunk(
        self,
        chunk: Chunk,
        weights: set[Weight],
        values: Mapping[str, Tensor],
        leased: Mapping[str, Mapping[str, Tensor]],
        job: Job,
        *,
        written: bool,
    ) -> None:
        """Step on what is leased."""

        def gradients(pieces: list[Piece]) -> list[Tensor]:
            if job.given is not None:
                raw = [piece.of(job.given[piece.weight]) for piece in pieces]
            else:
                assert chunk.part is not None
                raw = [leased[chunk.part.name][piece.key] for piece in pieces]
            return self._prepared(raw, [piece.weight for piece in pieces], job.coefficients)

        self._stepper.step(chunk, values, weights, gradients, leased, job.hyper, lambda: job.begun.add(chunk), written=written)

    def _rewrite(self, chunks: Iterable[Chunk], values: Mapping[str, Tensor]) -> None:
        """Narrow masters into weights that no step has written."""
        for chunk in chunks:
            with ExitStack() as leases:
                for piece in chunk.pieces:
                    where = chunk.tensors[piece].get(MASTER)
                    if where is None:
                        master = chunk.values[piece][MASTER]
                    else:
                        master = leases.enter_context(self.tiered.buffers.lease(where))[f"{MASTER}.{piece.key}"]
                    piece.of(values[piece.weight.stored]).copy_(master)

    def _prepared(self, given: list[Tensor], weights: Sequence[Weight], coefficients: Iterable[Coefficient]) -> list[Tensor]:
        """Gradients as the optimizer is to see them. What is in the store stays as it is."""
        gradients = list(given)
        narrow = [number for number, gradient in enumerate(given) if self.master_dtype not in (None, gradient.dtype)]
        if narrow:
            for number in narrow:
                gradients[number] = torch.empty_like(given[number], dtype=self.master_dtype)
            # One call: each costs the host as much as a kernel.
            torch._foreach_copy_([gradients[number] for number in narrow], [given[number] for number in narrow])
        for each in coefficients:
            for coefficient, numbers in _by_coefficient(each, weights):
                ours = [number for number in numbers if gradients[number] is not given[number]]
                others = [number for number in numbers if gradients[number] is given[number]]
                if ours:  # in place: a second copy of all would take as much again
                    torch._foreach_mul_([gradients[number] for number in ours], coefficient)
                if others:
                    scaled = torch._foreach_mul([given[number] for number in others], coefficient)
                    for number, gradient in zip(others, scaled, strict=True):
                        gradients[number] = gradient
        if self._writes_gradients:
            gradients = [gradient.clone() if gradient is raw else gradient for gradient, raw in zip(gradients, given, strict=True)]
        return gradients

    def _norm_of(self, weight: Weight) -> Tensor | None:
        assert self._norm_type is not None
        total = self.tiered.gradients.of[weight.block]
        if not any(weight in part.present for part in total.parts):
            return None
        known = self._norms.get(weight)
        if known is None:
            gradient = total.read(weight)
            assert gradient is not None
            (known,) = norms_of([gradient], self._norm_type, self.master_dtype)
            self._norms[weight] = known
        return known

    def _clip_in_place(self) -> None:
        """More is to come on top of clipped gradients: they have to be stored clipped.

        Raises:
            TrainingError: They are to be clipped widened, which what is stored cannot hold.
        """
        if self.master_dtype is not None:
            raise TrainingError(
                "gradients were clipped and others are added, or clipped once more, before step()",
                remedy="clip once, right before step(): with master_dtype= clipped gradients are not stored",
            )
        self.finish()  # with the gradients as they are
        coefficients, self._coefficients = self._coefficients, []
        self._norms.clear()
        for chunks in self._chunks.values():
            for chunk in chunks:
                if chunk.part is None or not chunk.part.present:
                    continue
                with self.tiered.buffers.lease(chunk.part.name, write=[chunk.part.name]) as stored:
                    for piece in chunk.pieces:
                        if piece.weight in chunk.part.present:
                            stored[piece.key].copy_(self._prepared([stored[piece.key]], [piece.weight], coefficients)[0])

    def as_clipped(self, weight: Weight, gradient: Tensor) -> Tensor:
        """A gradient as `clip_grad_norm_` would have left it in torch. With masters, only what the next step sees is clipped."""
        if weight not in self._weights or self.master_dtype is not None:
            return gradient
        return self._prepared([gradient], [weight], self._coefficients)[0]

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_of(self, parameter: str) -> dict[str, Any]:
        """The optimizer's state of one parameter, as torch has it in `state[parameter]`; its master, if any, as "master". On the CPU.

        Args:
            parameter: Its full name.
        """
        weight = next((weight for weight in self._weights if parameter in weight.aliases), None)
        if weight is None:
            raise OptionError(f"no parameter {parameter!r} in this optimizer", remedy="give a name of model.named_parameters()")
        self.settle([weight.block])
        pieces = [(chunk, piece) for chunk in self._chunks[weight.block] for piece in chunk.pieces if piece.weight is weight]
        found: dict[str, Any] = {}
        parts: dict[str, list[Tensor]] = {}
        for chunk, piece in pieces:
            self._stepper.keep(chunk)
            found.update(chunk.values[piece])
            blocks: dict[str, Any] = {name: self.tiered.store.read(name) for name in dict.fromkeys(chunk.tensors[piece].values())}
            for key, name in chunk.tensors[piece].items():
                parts.setdefault(key, []).append(blocks[name][f"{key}.{piece.key}"])
        if not found and not parts and self._rules_for(weight).state_at_construction:
            value = self.tiered.store.read(weight.block.name)[weight.stored]  # type: ignore[index]
            leaf = value.to(self.tiered.device, self.master_dtype or weight.dtype)
            found.update(self._stepper.made_state(leaf, self._weights[weight]))
        for key, tensors in parts.items():
            found[key] = tensors[0] if len(pieces) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors]).view(weight.shape)
        return {key: value.cpu().clone() if isinstance(value, Tensor) else value for key, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of the same optimizer with everything resident: the one can be loaded into the other. On the CPU.

        With masters there is "masters" besides, by the same numbers.
        """
        self.finish()
        numbers: dict[Weight, int] = {}
        groups: list[dict[str, Any]] = []
        by_stand_in = {weight.stand_in: weight for weight in self._weights}
        for group in self.param_groups:
            weights = [by_stand_in[parameter] for parameter in group["params"]]
            for weight in weights:
                numbers[weight] = len(numbers)
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "params": [numbers[weight] for weight in weights]})
        state: dict[int, dict[str, Any]] = {}
        masters: dict[int, Tensor] = {}
        for weight, number in numbers.items():
            found = self.state_of(weight.name)
            master = found.pop(MASTER, None)
            if master is not None:
                masters[number] = master
            if found:
                state[number] = found
        return {"state": state, "param_groups": groups, **({"masters": masters} if self.master_dtype is not None else {})}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` of this or of torch's optimizer returned.

        Raises:
            TrainingError: It is of another optimizer.
        """
        self.finish()
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            have = f"groups of {sizes}"
            need = f"groups of {[len(group['params']) for group in self.param_groups]} parameters"
            raise TrainingError(
                "the state is of an optimizer with other groups", need=need, have=have, remedy="load one of the same groups"
            )
        by_stand_in = {weight.stand_in: weight for weight in self._weights}
        weights: dict[Weight, int] = {}
        for group, loaded in zip(self.param_groups, groups, strict=True):
            for parameter, number in zip(group["params"], loaded["params"], strict=True):
                weights[by_stand_in[parameter]] = number
        masters = state_dict.get("masters")
        for weight, number in weights.items():
            self._check_loaded(weight, {**state_dict["state"].get(number, {}), MASTER: (masters or {}).get(number)})
        for group, loaded in zip(self.param_groups, groups, strict=True):
            # Copies: a schedule writes into a learning rate that is a tensor, and must not reach what was loaded.
            group.update(own_options({key: value for key, value in loaded.items() if key not in ("params", "param_names")}))
        if state_dict["state"]:
            self.go_on()
        for chunks in self._chunks.values():
            for chunk in chunks:
                new: dict[tuple[Piece, str], Tensor] = {}
                values: dict[Piece, dict[str, Any]] = {piece: {} for piece in chunk.pieces}
                # Torch's own state has no masters: those that are there stay, as parameters do.
                present = self._masters_of(chunk) if masters is None else {}
                for piece in chunk.pieces:
                    number = weights[piece.weight]
                    found = dict(state_dict["state"].get(number, {}))
                    if self.master_dtype is not None and masters is not None and number in masters:
                        found[MASTER] = masters[number]
                    for key, value in found.items():
                        if not isinstance(value, Tensor):
                            values[piece][key] = value
                        elif value.numel() > 1:
                            new[piece, key] = self._cast(piece.of(value.contiguous()), piece.weight, key)
                        else:
                            values[piece][key] = self._cast(value, piece.weight, key).clone()
                    if piece in present and present[piece].numel() > 1:
                        new[piece, MASTER] = present[piece]
                    elif piece in present:
                        values[piece][MASTER] = present[piece]
                self._stepper.replace(chunk, new, values)
                if masters is not None:
                    chunk.version = self.tiered.version_of(chunk.block)

    def _check_loaded(self, weight: Weight, state: Mapping[str, Any]) -> None:
        """Refuse state of a parameter of another shape: it would be found out only in the middle of a step.

        Raises:
            TrainingError: It is.
        """
        ndim = min(len(weight.shape), MAX_NDIM)
        alike = {MASTER, *(entry.key for entry in self._rules_for(weight).entries if entry.kind is Kind.SAME and entry.ndim == ndim)}
        for key, value in state.items():
            if key in alike and isinstance(value, Tensor) and value.shape != weight.shape:
                raise TrainingError(
                    f"the state {key!r} of parameter {weight.name!r} is of a parameter of another shape",
                    need=str(tuple(weight.shape)),
                    have=str(tuple(value.shape)),
                    remedy="load state of the same model, with its parameters in the same order",
                )

    def _masters_of(self, chunk: Chunk) -> dict[Piece, Tensor]:
        """Copies of what there is of masters."""
        found: dict[Piece, Tensor] = {}
        for piece in chunk.pieces:
            if MASTER in chunk.tensors[piece]:
                block = self.tiered.store.read(chunk.tensors[piece][MASTER])
                assert isinstance(block, dict)
                found[piece] = block[f"{MASTER}.{piece.key}"]
            elif MASTER in chunk.values[piece]:
                found[piece] = chunk.values[piece][MASTER]
        return found

    def _cast(self, value: Tensor, weight: Weight, key: str) -> Tensor:
        """As torch does with the state that it loads: whatever else it is, it gets the parameter's dtype and comes to its device.

        Not counts of steps: 16 bits could not count far, and a kernel that takes one tensor at a time reads them on the host. Fused and
        captured kernels read them on the device, in fp32.
        """
        dtype = self.master_dtype or weight.dtype
        if key != "step":
            # What has more elements is copied into the store, wherever it is.
            return value.to(dtype) if value.numel() > 1 else value.to(self.tiered.device, dtype)
        group = self.param_groups[self._weights[weight]]
        return value.to(self.tiered.device, torch.float32) if group.get("fused") or group.get("capturable") else value

    def let_go(self) -> None:
        """The model is detached: state stays in the store, and is of no use to this object any more."""
        self._pending.clear()

    def take_over(self, block: WeightBlock, stored: Collection[Stored], values: Mapping[Weight, dict[str, Any]]) -> None:
        """Have the state of one block that lies in the store in other pieces. See [Note: Cut anew].

        Args:
            block: Of weights.
            stored: Where it lies. Afterwards it does no more.
            values: What is not in the store.
        """
        for chunk in self._chunks[block]:
            new = gather(self.tiered.store, stored, chunk.pieces)
            own = {piece: _copied(values.get(piece.weight, {})) for piece in chunk.pieces}  # a count of steps is changed in place
            self._stepper.replace(chunk, new, own)
        for name in dict.fromkeys(each.block for each in stored):
            self.tiered.buffers.delete(name)

    @property
    def attributes(self) -> dict[str, Any]:
        """What steps have changed of attributes of instances. See `instances`, [Note: What steps change beside parameters]."""
        return self._attributes

    @property
    def clipped(self) -> list[Coefficient]:
        """By what `clip_grad_norm_` has had the gradients multiplied; they are stored as they were."""
        return self._coefficients

    @clipped.setter
    def clipped(self, coefficients: list[Coefficient]) -> None:
        self._coefficients = coefficients

    @property
    def weights(self) -> Collection[Weight]:
        """What it updates."""
        return self._weights.keys()

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks, in the order of the blocks."""
        return [chunk for chunks in self._chunks.values() for chunk in chunks]


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _settle(tiered: weakref.ref[Tiered], block: WeightBlock) -> None:
    present = tiered()
    if present is not None:
        present.settle([block])


def factory_name(factory: Any) -> str:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return str(getattr(factory, "__name__", type(factory).__name__))


def _by_coefficient(each: Coefficient, weights: Sequence[Weight]) -> list[tuple[Tensor, list[int]]]:
    """What is to be multiplied by what, the weights by their places."""
    if isinstance(each, Tensor):
        return [(each, list(range(len(weights))))]
    found: dict[int, tuple[Tensor, list[int]]] = {}
    for number, weight in enumerate(weights):
        coefficient = each.get(weight)
        if coefficient is not None:
            found.setdefault(id(coefficient), (coefficient, []))[1].append(number)
    return list(found.values())
