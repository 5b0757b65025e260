"""`attach`: a model whose parameters live in a store, and are on the device while the module that owns them runs."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tierstore.errors import CapacityError, OptionError, TensorError, TierFullError, TrainingError
from tierstore.residency import Tier
from tierstore.sync import TierStore
from tierstore.training.activations import Activations
from tierstore.training.gradients import Gradients, Sums
from tierstore.training.initial import Fill, ModelFiles, Source, check_buffers, filler, given_memory, owners
from tierstore.training.leasing import Buffers
from tierstore.training.pieces import Piece
from tierstore.training.placeholders import Placeholder, refuse_optimizers_of, refuse_saving
from tierstore.training.running import Call, check_splittable, copies_for, run_unit
from tierstore.training.splitting import plan_split, sizes_of, take_apart
from tierstore.training.state import State
from tierstore.training.structure import Kind, Structure, Unit, Weight, WeightBlock, find_layers, read_structure, together
from tierstore.training.surroundings import ordinary_tensors
from tierstore.training.threads import Local

if TYPE_CHECKING:
    from tierstore.training.optimizer import TieredOptimizer

log = logging.getLogger("tierstore")
T = TypeVar("T")

_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_STORES: weakref.WeakSet[TierStore] = weakref.WeakSet()
_TIERED: weakref.WeakSet[Tiered] = weakref.WeakSet()
"""What is attached. Weakly, since what is attached has both of them."""

_ENGINE: Any = torch.autograd.Variable._execution_engine


def attach(
    model: nn.Module,
    store: TierStore,
    layers: object = None,
    *,
    micro_batch: int | None = None,
    activations: Literal["device", "ram", "nvme"] = "device",
    split: Collection[str] | None = None,
    init: Source = None,
) -> Tiered:
    """Move a model's parameters into a store and have each module lease its own while it runs.

    Forward passes go on as before, `model(batch)`, and so do backward passes; gradients go into the store, where a `TieredOptimizer`
    finds them. On a store that holds a commit of this model, its values are taken and the model's own are dropped.

    Args:
        model: Any module. Parameters on the meta device are initialised block by block, see `init`.
        store: Open, with room on the device for the largest layer's parameters, and an optimizer's work on a piece of it beside them.
        layers: The modules that run one after the other and make up most of the model: a list, a pattern of names ("model.layers.*"; the
            outermost of that name count), or None for the largest `ModuleList` and those like it.
        micro_batch: Rows that a layer computes at once; None: all. With it, a layer is fetched once for all micro-batches of a step.
        activations: Where the inputs of layers wait for the backward pass.
        split: Names of the arguments of layers that micro-batches split, beside the first tensor. None: tensors with as many rows as it.
        init: For parameters without values: a safetensors file or a directory of them, or a function called with (name, module) for each
            module that owns some, after it was given memory on the CPU. None: the model's own `_init_weights(module)`, or the modules'
            `reset_parameters()`.

    Returns:
        What holds model and store together; `detach()` gives an ordinary model back.

    Raises:
        OptionError: An argument is not understood.
        TrainingError: The model is attached already, or cannot be.
        TensorError: The store holds a model of other shapes.
        CapacityError: A block is too large for the budgets.
    """
    if not isinstance(store, TierStore):
        remedy = "open a TierStore: a training loop is synchronous"
        raise OptionError("attach() needs a TierStore", have=type(store).__name__, remedy=remedy)
    if activations not in ("device", "ram", "nvme"):
        raise OptionError(
            "activations= is not understood", need="'device', 'ram' or 'nvme'", have=repr(activations), remedy="give one of these"
        )
    if activations == "nvme" and store.engine.directory is None:
        raise OptionError("activations='nvme', but the store has no NVMe tier", remedy="open it with nvme=DIRECTORY")
    if micro_batch is not None and (not isinstance(micro_batch, int) or micro_batch < 1):
        raise OptionError("micro_batch= is not understood", need="a number of rows, or None", have=repr(micro_batch), remedy="give such")
    taken = next(
        (module for module in model.modules() if any(isinstance(value, Placeholder) for value in module._parameters.values())), None
    )
    if taken is not None or model in _MODELS:
        raise TrainingError("the model, or a part of it, is attached already", remedy="detach() it first")
    if store in _STORES:
        remedy = "detach() that one first, or open another store"
        raise TrainingError("another model is attached to the store", need="a store for each model", remedy=remedy)
    structure = read_structure(model, find_layers(model, layers))
    files = init if isinstance(init, ModelFiles) else None
    fill = filler(model, init)
    return Tiered(model, store, structure, micro_batch=micro_batch, activations=activations, split=split, fill=fill, files=files)


class Tiered:
    """A model attached to a store. Made by `attach`.

    Methods may be called from the thread that runs the training loop.

    Attributes:
        model, store: As attached.
        device: Where the model computes.
        resumed: Whether the parameters came from the store's commit.
        uncached: Ids of the configurations whose `use_cache` was set to False, until `detach()`.
    """

    def __init__(
        self,
        model: nn.Module,
        store: TierStore,
        structure: Structure,
        *,
        micro_batch: int | None,
        activations: str,
        split: Collection[str] | None,
        fill: Fill,
        files: ModelFiles | None,
    ) -> None:
        """Use `attach`."""
        self.model = model
        self.store = store
        self.device = store.device
        self.structure = structure
        self.micro_batch = micro_batch
        self.split = split
        self.buffers = Buffers(store)
        self.gradients = Gradients(self.buffers, structure.blocks)
        self.activations = Activations(self.buffers, activations) if activations != "device" else None
        self.state = State(self)
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self.optimizers: list[TieredOptimizer] = []
        self.still_buffers: set[tuple[nn.Module, str]] = set()
        self.uncached: set[int] = set()
        self._anchor_node = torch.autograd.graph.get_gradient_edge(self.anchor).node
        self._awaited: dict[WeightBlock, set[int]] = {}
        self._local = Local()
        self._copies: dict[int, tuple[weakref.ref[Tensor], Tensor, int, Call]] = {}
        self._tasks: set[int] = set()
        self._crowd = threading.Lock()
        self.settling = threading.RLock()
        self._user: int | None = None
        self._num_uses = 0
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self._attached = True
        self._told = False
        self._undo: list[Callable[[], None]] = []
        self._units = {id(each.module): each for unit in structure.units for each in (unit, *unit.inner)}
        self._together: dict[tuple[int, ...], Unit] = {}
        self.resumed = self._move_in(fill, files)
        self._wrap()
        self.state.open()
        self._undo.append(refuse_optimizers_of(self, [weight.origin for weight in structure.weights if weight.origin is not None]))
        _MODELS.add(model)
        _STORES.add(store)
        _TIERED.add(self)

    def __repr__(self) -> str:
        layers = len(self.structure.layers)
        numel = sum(weight.numel for weight in self.structure.weights)
        return f"<Tiered: {numel:,} parameters in {len(self.structure.blocks)} blocks, {layers} layers, {self.store!r}>"

    # -- moving in and out -----------------------------------------------------------------------------------------------

    def _move_in(self, fill: Fill, files: ModelFiles | None) -> bool:
        """Put what the store does not have, and hang placeholders in the places of parameters.

        Returns:
            Whether it had all, from an earlier training: what has only been adopted begins one.
        """
        self.state.read()
        if files is not None:
            files.name(self.structure)
        names = {block.name for block in self.structure.blocks}
        known = {name for name in names if name in self.store}
        if known and known != names:
            raise TensorError(
                "the store holds a part of this model, or another one",
                need=f"{len(names)} blocks",
                have=f"{len(known)} of them; missing is {min(names - known)!r}",
                remedy="attach with the same layers= as when it was committed, or open another directory",
            )
        if known:
            for block in self.structure.blocks:
                self._check_known(block)
            trained = [name for name in known if not self.store.info(name).adopted]
            log.info(
                "taking the parameters of the store, not the model's: %d blocks, %d of them adopted", len(known), len(known) - len(trained)
            )
        done: set[Weight] = set()
        put: list[str] = [] if known or files is None else list(files.adopt(self.structure, self.store))
        adopted = frozenset(put)
        module_names = {id(module): name for name, module in self.model.named_modules()}
        try:
            for unit in self.structure.units:
                blocks = [block for block in unit.blocks if block.weights[0] not in done]
                weights = [weight for block in blocks for weight in block.weights]
                done.update(weights)
                lacking = [block for block in blocks if not known and block.name not in adopted]
                if lacking:
                    with given_memory(unit, [weight for block in lacking for weight in block.weights]) as empty:
                        if empty:
                            fill(owners(unit, module_names), empty)
                        for block in lacking:
                            self._put(block)
                            put.append(block.name)
                for weight in weights:
                    self._hang_placeholder(weight)
            check_buffers(self.model)
            for module in self.model.modules():
                for attribute, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[attribute] = buffer.to(self.device)
        except BaseException:
            self._hang_origins()
            for name in put:
                self.store.delete(name)
            raise
        return bool(known and trained)

    def _check_known(self, block: WeightBlock) -> None:
        info = self.store.info(block.name)
        have = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in info.tensors.items()}
        need = {weight.stored: (tuple(weight.shape), weight.dtype) for weight in block.weights}
        unfit = info.frozen == block.trainable and not (info.adopted and not block.trainable)  # what was adopted may stay as it is
        if have != need or unfit:
            different = next((name for name in {**need, **have} if need.get(name) != have.get(name)), block.name)
            raise TensorError(
                f"block {block.name!r} of the store does not fit the model",
                need=f"{different!r}: {need.get(different, 'nothing')}" if have != need else "trainable" if block.trainable else "frozen",
                have=str(have.get(different, "nothing")) if have != need else "frozen" if info.frozen else "trainable",
                remedy="attach the model that was committed, or open another directory",
                block=block.name,
                tensor=different,
            )

    def _put(self, block: WeightBlock) -> None:
        tensors: dict[str, Tensor] = {}
        for weight in block.weights:
            module, attribute = weight.slots[0]
            parameter = module._parameters[attribute]
            assert parameter is not None
            tensors[weight.stored] = parameter.detach()
        try:
            self.store.put(block.name, tensors, frozen=not block.trainable)
        except TierFullError:
            raise
        except CapacityError as error:
            remedy = "name smaller modules in layers=, or raise the smaller of gpu= and ram="
            if not self.store.engine.placement.has_nvme:
                remedy = "raise ram=, or give nvme=; or, where one module is larger than the device, name smaller ones in layers="
            raise CapacityError(
                f"{block.name!r} does not fit: a module's parameters move, and are on the device, all together",
                need=error.need,
                have=error.have,
                remedy=remedy,
                block=block.name,
            ) from error

    def _hang_placeholder(self, weight: Weight) -> None:
        stand_in = Placeholder(weight.name, tuple(weight.shape), weight.dtype, weight.requires_grad, self.device)
        weight.stand_in = stand_in
        for module, attribute in weight.slots:
            if weight.origin is None:
                weight.origin = module._parameters[attribute]
            module._parameters[attribute] = stand_in
        if weight.origin is not None and not weight.origin.is_meta:
            with torch.no_grad():
                weight.origin.data = torch.empty(0, dtype=weight.dtype)

    def _hang_origins(self) -> None:
        """Moving in failed: have the model as it was, but for values that had left it."""
        for weight in self.structure.weights:
            if weight.origin is not None:
                if weight.origin.shape != weight.shape:
                    values = self.store.read(weight.block.name)
                    assert isinstance(values, dict)
                    weight.origin.data = values[weight.stored]
                for module, attribute in weight.slots:
                    module._parameters[attribute] = weight.origin

    def _wrap(self) -> None:
        for unit in self.structure.units:
            for each in (unit, *unit.inner):
                if each.kind is Kind.SCOPE:
                    self._wrap_module(each.module, functools.partial(self._run_scope, each))
                else:
                    self._wrap_module(each.module, functools.partial(self._run_unit, each))
        self._wrap_module(self.model, self._run_model)
        self.replace_method(self.model, "zero_grad", self._zero_grad)
        for module in self.model.modules():
            # Without it a load that assigns would put parameters beside the store's, and one that copies be told by an odd error.
            self._undo.append(module.register_load_state_dict_pre_hook(_refuse_loading).remove)
            self._undo.append(module.register_state_dict_pre_hook(refuse_saving).remove)
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", None) is True:  # a cache would be filled a second time in the backward pass
                config.use_cache = False
                self.uncached.add(id(config))
                self._undo.append(functools.partial(setattr, config, "use_cache", True))

    def _wrap_module(self, module: nn.Module, run: Callable[..., Any]) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return run(forward, args, kwargs)

        # A compiler that looked into a lease would draw other random numbers when the layer is computed once more: dropout would be wrong.
        self.replace_method(module, "forward", torch.compiler.disable(wrapper))

    def replace_method(self, module: nn.Module, name: str, value: object) -> None:
        """Have another one in its place until `detach()`."""
        before = module.__dict__.get(name, self)

        def undo() -> None:
            if before is self:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

        module.__dict__[name] = value
        self._undo.append(undo)

    def detach(self) -> nn.Module:
        """Give the model its parameters back, on the CPU, with the newest values. The store keeps what it has.

        Pending updates are carried out; gradients are lost.

        Raises:
            TrainingError: It is detached already, or one of its modules runs.
        """
        self._check_attached()
        if self._num_uses:
            raise TrainingError("detach() while a module of the model runs", remedy="call it when forward and backward passes are over")
        self.finish()
        for block in self.structure.blocks:
            values = self.store.read(block.name)
            assert isinstance(values, dict)
            for weight in block.weights:
                parameter = weight.origin
                if parameter is None or parameter.is_meta:
                    parameter = nn.Parameter(values[weight.stored], requires_grad=weight.requires_grad)
                else:
                    parameter.data = values[weight.stored]
                    parameter.requires_grad_(weight.requires_grad)
                weight.stand_in.__dict__["attached"] = False
                for module, attribute in weight.slots:
                    module._parameters[attribute] = parameter
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for module in self.model.modules():
            _refresh_flat_weights(module)
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[attribute] = buffer.cpu()
        self.gradients.forget()
        if self.activations is not None:
            self.activations.forget()
        self.state.write()  # what is in the store is of one moment, should anybody attach to it again
        for optimizer in self.optimizers:
            optimizer.let_go()
        self.state.close()
        self._attached = False
        _MODELS.discard(self.model)
        _STORES.discard(self.store)
        _TIERED.discard(self)
        return self.model

    def _check_attached(self) -> None:
        if not self._attached:
            raise TrainingError("the model was detached", remedy="attach() it again")

    # -- running ---------------------------------------------------------------------------------------------------------

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function of the model's modules as a forward pass of the model: a loss that calls the body and the head by themselves."""
        result: T = self._run_model(function, args, {})
        return result

    def _run_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._copies.clear()
        try:
            return forward(*args, **kwargs)
        finally:
            self._copies.clear()  # the graph that a copy is in holds the tensor that it is a copy of, and so would never be freed

    def _run_scope(self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._alone():
            check_unchanged(unit)
            copies = copies_for(self, unit)
            try:
                for module, attribute, weight in unit.places:
                    module._parameters[attribute] = copies[weight]  # type: ignore[assignment]
                return forward(*args, **kwargs)
            finally:
                for module, attribute, weight in unit.places:
                    module._parameters[attribute] = weight.stand_in

    def _run_unit(self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._local.has(unit):
            return forward(*args, **kwargs)
        split = unit.kind is Kind.LAYER and self.micro_batch is not None
        arguments, tensors = take_apart(args, kwargs, merge=not split)
        if torch.is_grad_enabled():
            refuse_caches(arguments.leaves, unit)
        if split:
            assert self.micro_batch is not None
            check_splittable(unit)
            plan_split(arguments, tensors, self.micro_batch, forward=forward, split=self.split, args=args, kwargs=kwargs, layer=unit.name)
        return run_unit(self, unit, forward, arguments, tensors, (args, kwargs))

    def run_together(self, modules: list[nn.Module], function: Callable[..., Any], args: tuple[Tensor, ...], rows: int) -> Any:
        """Run a function of several modules as one unit, over some rows of its arguments at a time, which come to one row of the result."""
        key = tuple(map(id, modules))
        unit = self._together.get(key)
        if unit is None:
            found = [self._units[id(module)] for module in modules if id(module) in self._units]
            unit = self._together[key] = together(found)
        arguments, tensors = take_apart(args, {})
        arguments.splits = [True] * len(tensors)
        arguments.sizes = sizes_of(tensors[0].shape[0], rows)
        arguments.one_row_each = True
        return run_unit(self, unit, function, arguments, tensors)

    @contextlib.contextmanager
    def leased(self, unit: Unit, requires_grad: bool = True, *, place: bool = True) -> Iterator[dict[Weight, Tensor]]:
        """Lease a unit's blocks, as they are to be computed with, and hang their tensors in their places.

        Args:
            unit: Which.
            requires_grad: Whether trainable ones require a gradient.
            place: Whether to hang them.
        """
        self.settle(unit.blocks)
        names = [block.name for block in unit.blocks]
        with self._alone(), self.buffers.lease(*names, plain=False) as leased:
            mappings: tuple[Mapping[str, Tensor], ...] = leased if len(names) != 1 else (leased,)
            leaves = {
                weight: mapping[weight.stored].requires_grad_(weight.requires_grad and requires_grad)
                for block, mapping in zip(unit.blocks, mappings, strict=True)
                for weight in block.weights
            }
            if not place:
                yield {weight: leaves[weight] for weight in dict.fromkeys(weight for _, _, weight in unit.places)}
                return
            check_unchanged(unit)
            try:
                for module, attribute, weight in unit.places:
                    module._parameters[attribute] = leaves[weight]  # type: ignore[assignment]
                for module in unit.flat:
                    _refresh_flat_weights(module)
                with self._local.running(unit):
                    yield leaves
            finally:
                for module, attribute, weight in unit.places:
                    module._parameters[attribute] = weight.stand_in
                for module in unit.flat:
                    _refresh_flat_weights(module)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Parameters hang in their places for one user at a time.

        Raises:
            TrainingError: Another thread is at it.
        """
        owner = self.buffers.owner
        with self._crowd:
            if self._num_uses and self._user != owner:
                remedy = "wait for it, or attach a copy of the model"
                raise TrainingError("the model is in use on another thread", need="one thread at a time", remedy=remedy)
            self._user = owner
            self._num_uses += 1
        try:
            yield
        finally:
            with self._crowd:
                self._num_uses -= 1

    def free_of_lease(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy where it is a view of leased memory, which is gone when the lease is."""
        if tensor.device.type == self.device.type and self.store.engine.device.owns(tensor):
            return tensor.clone()
        return tensor

    def latest_copy(self, tensor: Tensor) -> Tensor:
        """What the last unit that used the tensor passed on of it. See `running`, [Note: A unit in the graph]."""
        entry = self._copies.get(id(tensor))
        if entry is None:
            return tensor
        reference, copy, version, call = entry
        # What was changed in place since has another history: the copy leads past the change. And a unit whose backward pass is over adds
        # nothing any more: a tensor that is used again and again (detached, with a head at a time) would trail all of them.
        same = reference() is tensor and version == tensor._version
        return copy if same and not call.has_ended else tensor

    def note_copy(self, tensor: Tensor, copy: Tensor, call: Call) -> None:
        key = id(tensor)
        copies = self._copies

        def gone(reference: weakref.ref[Tensor]) -> None:
            entry = copies.get(key)
            if entry is not None and entry[0] is reference:
                del copies[key]

        copies[key] = (weakref.ref(tensor, gone), copy, tensor._version, call)

    # -- gradients -------------------------------------------------------------------------------------------------------

    def version_of(self, block: WeightBlock) -> int:
        """Counts the changes of a block's weights, whoever makes them."""
        return self.store.engine.scheduler.names[block.name].version

    def await_backward(self, unit: Unit, call: int) -> None:
        """A call of the unit, by a number of its own, is to have a backward pass."""
        for block in unit.blocks:
            if block.trainable:
                self._awaited.setdefault(block, set()).add(call)

    def awaited_no_more(self, unit: Unit, call: int) -> None:
        """It has had it, or will never have it. From any thread, also in a finaliser: a set's `discard` cannot be interrupted."""
        for block in unit.blocks:
            if block.trainable:
                self._awaited[block].discard(call)

    def wants_gradients(self) -> bool:
        """Whether the backward pass under way is to have gradients of parameters, which `torch.autograd.grad` by others is not."""
        wanted: bool = torch._C._will_engine_execute_node(self._anchor_node)
        return wanted

    def sums_so_far(self, unit: Unit) -> Sums:
        """What this backward pass has come to so far for the unit's parameters.

        Raises:
            TrainingError: Another pass, inside of which this one is, has a sum that is not complete.
        """
        task = torch._C._current_graph_task_id()
        sums: Sums = {}
        for block in unit.blocks:
            if block.trainable:
                partial = self.gradients._partials.get(block)
                if partial is not None and partial.task != task and partial.task in self._tasks and partial.sum.present:
                    raise TrainingError(
                        f"a backward pass inside of another one comes upon {block.name!r}, whose gradient the other one is adding up",
                        remedy="have torch.utils.checkpoint not nest them: use_reentrant=False",
                    )
                sums.update(self.gradients.begin(block, task))
        return sums

    def between(self, shares: int) -> None:
        """A micro-batch of a backward pass has been queued: make a part of the last layer's update, one of so many of what is left."""
        for optimizer in self.optimizers:
            optimizer.make_share(shares)

    def ahead(self, unit: Unit, done: int, count: int) -> None:
        """So many of the micro-batches of a unit's forward pass have been queued: make a part of a later layer's update that has waited."""
        for optimizer in self.optimizers:
            optimizer.make_share_ahead(unit, done, count)

    def add_gradients(self, unit: Unit, sums: Sums, *, spread: bool = False) -> None:
        """A unit's contributions are complete: add the sums to the gradients, or hand them on to who is still to come.

        Args:
            unit: Whose.
            sums: On the device.
            spread: What updates them may do so behind the micro-batches of the next unit.
        """
        task = torch._C._current_graph_task_id()
        for optimizer in self.optimizers:
            optimizer.catch_up()
        for block in unit.blocks:
            if not block.trainable:
                continue
            mine = {weight: sums[weight] for weight in block.weights if weight in sums}
            if not mine:
                continue
            if len(self._awaited.get(block, ())) > 1:
                self.gradients.keep(block, task, mine)
                self._await_end(task)
            elif spread and self.store.engine.scheduler.names[block.name].hold is not Tier.GPU:
                self._await_end(task)
                self._join(block, mine, spread=True)
            else:
                self._join(block, mine)

    def _await_end(self, task: int) -> None:
        """Have `_end_backward` called at the end of a backward pass."""
        if task not in self._tasks:
            self._tasks.add(task)
            _ENGINE.queue_callback(_AtEnd(self, task, self.buffers.owner))

    def _end_backward(self, task: int, owner: int) -> None:
        """The backward pass is over: what was put off is updated, what was handed on and found no one else is added to the gradients."""
        self._tasks.discard(task)
        before = self.buffers.acting_for(owner)
        try:
            with ordinary_tensors():
                for optimizer in self.optimizers:
                    optimizer.catch_up()
                for block in self.gradients.kept(task):
                    self._join(block, self.gradients.begin(block, task))
        finally:
            self.buffers.back_to(before)

    def _join(self, block: WeightBlock, sums: Sums, *, spread: bool = False) -> None:
        if not self.optimizers and not self._told:
            self._told = True
            log.warning("gradients are kept, but nothing updates this model: make TieredOptimizer(tiered, torch.optim.AdamW, ...)")
        for optimizer in self.optimizers:
            if optimizer.takes(block):
                sums = optimizer.take_gradients(block, sums, spread=spread)
        if sums:
            for optimizer in self.optimizers:
                optimizer.before_adding(block)
            observers = [seen for optimizer in self.optimizers if (seen := optimizer.observer(block)) is not None]

            def observe(totals: Sums) -> None:
                for seen in observers:
                    seen(totals)

            self.gradients.of[block].add(sums, observe if observers else None)

    def cut_gradients(self, block: WeightBlock, optimizer: TieredOptimizer, pieces: list[list[Piece]]) -> None:
        """Have the gradients of a block come in the pieces in which an optimizer takes them."""
        mine = {piece.weight for chunk in pieces for piece in chunk}
        kept = [part.pieces for part in self.gradients.of[block].parts]
        others = [[piece for piece in part if piece.weight not in mine] for part in kept]
        self.gradients.cut(block, [*pieces, *[part for part in others if part]])
        for each in [*self.optimizers, optimizer]:
            each.refresh_parts(block)

    def resume(self, **objects: Any) -> Any:
        """Go on where the store's last commit was made, or begin. Called once, right before the loop.

            done = tiered.resume(scheduler=scheduler, sampler=sampler) or {"step": 0}

        Objects with `state_dict()` and `load_state_dict()` are part of every commit from here on. If the store held a commit when the model
        was attached, their state comes back, and so do the options of the optimizers' groups and the random numbers of Python, NumPy
        and torch.

        Args:
            objects: By names of your own: schedulers, samplers, loaders.

        Returns:
            The metadata of the commit, {} if it was given none; None at the beginning.

        Raises:
            TrainingError: An object that the commit has and is not given, or the other way round; one without the two methods; or a
                step was taken already.
        """
        return self.state.resume(objects)

    def gradient(self, name: str) -> Tensor | None:
        """A copy of the gradient of one parameter, on the device; None where there is none.

        Args:
            name: The parameter's full name.

        Raises:
            OptionError: The model has no such parameter, or it is frozen.
        """
        weight = next((weight for weight in self.structure.weights if name in weight.aliases), None)
        if weight is None or not weight.requires_grad:
            raise OptionError(f"no trainable parameter {name!r}", remedy="give a name of model.named_parameters()")
        gradient = self.gradients.of[weight.block].read(weight)
        for optimizer in self.optimizers:
            if gradient is not None:
                gradient = optimizer.as_clipped(weight, gradient)
        return gradient

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """In place of the model's own: have no gradients."""
        if not set_to_none:
            raise TrainingError("zero_grad(set_to_none=False) would store zeros", remedy="leave set_to_none out")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for total in self.gradients.of.values():
            total.erase()
        self.erase_unfinished()

    def erase_unfinished(self) -> None:
        """What backward passes that failed have left behind."""
        self.gradients.erase_partials()
        self._tasks.clear()

    # -- updates put off -------------------------------------------------------------------------------------------------

    def settle(self, blocks: Collection[WeightBlock]) -> None:
        """Carry out what is pending for these blocks."""
        for optimizer in self.optimizers:
            optimizer.settle(blocks)

    def finish(self) -> None:
        """Carry out all pending updates."""
        self.settle(self.structure.blocks)


class _AtEnd:
    """Called when a backward pass is over. Let go without having been called when it has failed."""

    def __init__(self, tiered: Tiered, task: int, owner: int) -> None:
        self._tiered = tiered
        self._task = task
        self._owner = owner

    def __call__(self) -> None:
        self._tiered._end_backward(self._task, self._owner)

    def __del__(self) -> None:
        self._tiered._tasks.discard(self._task)


def tiered_of(modules: Collection[nn.Module]) -> Tiered | None:
    """What the modules are attached to; None: they are ordinary ones.

    Raises:
        TrainingError: Some are, and others not to the same.
    """
    found: dict[Tiered | None, None] = {}
    for module in modules:
        if next(module.parameters(), None) is not None:
            of_module = [tiered for tiered in list(_TIERED) if id(module) in tiered._units]
            found[of_module[0] if of_module else None] = None
    if len(found) > 1:
        raise TrainingError("the modules are not attached to the same store", remedy="attach a model that has all of them")
    return next(iter(found), None)


def _refuse_loading(*_: object) -> None:
    remedy = "load before attach(), or give it init= a safetensors file; to replace values of an attached model, store.write()"
    raise TrainingError("load_state_dict() of an attached model, whose parameters are in the store", remedy=remedy)


def check_unchanged(unit: Unit) -> None:
    """Refuse to go on with a module that was given another parameter since it was attached: it would be dropped without a word.

    Raises:
        TrainingError: One was put into the place of another, or added.
    """
    for module, attribute, weight in unit.places:
        if module._parameters.get(attribute) is not weight.stand_in:
            raise TrainingError(
                f"parameter {weight.name!r} was replaced while the model is attached",
                need="the parameters that it was attached with",
                remedy="tie or replace before attach(), or detach() and attach() to another directory; for values only, store.write()",
                tensor=weight.name,
            )
    for module, below, count in unit.census:
        if len(module._parameters) != count or tuple(module._modules.values()) != below:
            raise TrainingError(
                f"parameters or modules were added to {unit.name!r}, or taken from it, while the model is attached",
                need="the modules that it was attached with",
                remedy="change the model before attach(), or detach() and attach() to another directory",
            )


def refuse_caches(leaves: Collection[object], unit: Unit) -> None:
    """Refuse an argument that the unit would change, as computing once more would change it again.

    Raises:
        TrainingError: A cache of keys and values.
    """
    for leaf in leaves:
        if leaf is not None and hasattr(leaf, "get_seq_length") and hasattr(leaf, "update"):
            remedy = "call the model with use_cache=False, or under torch.no_grad()"
            raise TrainingError(f"{unit.name!r} was given a {type(leaf).__name__} in training", remedy=remedy)


def _refresh_flat_weights(module: nn.Module) -> None:
    """Recurrent modules keep a second list of their parameters."""
    names = module.__dict__.get("_flat_weights_names")
    if names is not None:
        module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in names]
