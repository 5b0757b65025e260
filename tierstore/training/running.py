"""One call of a unit: its forward pass under a lease, and in the backward pass the same once more, to follow the gradients through it.

[Note: A unit in the graph]
For autograd a unit is one node. Its inputs are the tensors among the arguments, wherever in the argument tree they are, and an anchor:
a node none of whose inputs needs a gradient would get no backward pass, though its parameters need one. Its outputs are the tensors among
the results and, behind them, every input that needs a gradient once more: whoever uses that tensor next is given this copy. So its
gradient comes by here, and this unit's contributions are added to it one by one, last use first, which is the order in which autograd
adds them where no unit stands in between. It also comes by in backward passes that go through later uses alone: those find nothing to
compute here, and leave what the unit's own pass will need. The sums of parameters are handed on in the same way (`gradients`). In a
recomputed graph a sum goes in as the gradient of the leaf itself, which autograd adds first of all. It is handed over by a node of ours
(`_Sums`) and nobody else holds it then, so that autograd adds to it in place: else a second sum of the whole unit would lie beside it.

[Note: Only through the door]
So nothing else may lead into a unit or out of it. A tensor that needs a gradient and comes in through an attribute, a closure or an object
that pytree does not know would never get one, and neither would the unit from a loss that it leaves in an attribute: the graph of its
forward pass is thrown away. Both would train, and wrongly. The first is found where the graph of the results ends in a leaf that is none of
the unit's, the second by hooks on its leaves, which no gradient may ever reach.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from tierstore.errors import TrainingError
from tierstore.training.activations import Kept
from tierstore.training.gradients import Sums
from tierstore.training.splitting import Arguments, Outputs, check_alike, join, take_outputs_apart
from tierstore.training.structure import Kind, Unit, Weight
from tierstore.training.surroundings import AttentionKernels, Autocast, Generators, ordinary_tensors

if TYPE_CHECKING:
    from tierstore.training.layers import Tiered

Buffer = tuple[nn.Module, str]


class Call:
    """One call of a unit, from its forward pass to the end of its backward pass.

    Attributes:
        versions: Of the unit's blocks, when it computed.
        random: Where the generators were before each micro-batch; None where nothing was drawn.
        buffers: What buffers held before each micro-batch, of those that it changed.
        stayed: The inputs that `keep` returned, where autograd has them no more.
    """

    _ended = True  # of an object that never got to its `__init__`, as torch.compile makes some

    def __init__(self, tiered: Tiered, unit: Unit, forward: Callable[..., Any], arguments: Arguments) -> None:
        self._awaited = False
        self._ended = False
        self._kept: list[Kept | None] = []
        self.tiered = tiered
        self.unit = unit
        self.arguments = arguments
        self.outputs: Outputs | None = None
        self.stayed: Sequence[Tensor] | None = None
        self._forward = forward
        self._autocast = Autocast.now(tiered.device.type)
        self._attention = AttentionKernels.now()
        self._training: list[bool] = []
        self._random: list[Generators | None] = []
        self._buffers: list[dict[Buffer, Tensor | None]] = []
        self._num_inputs = 0
        self._owner = tiered.buffers.owner
        tiered.settle(unit.blocks)  # before the versions are noted with which it computes
        self._versions = [tiered.version_of(block) for block in unit.blocks]

    def __del__(self) -> None:
        self._end()

    @property
    def has_ended(self) -> bool:
        """Whether its backward pass is over, or will never come."""
        return self._ended

    def _end(self) -> None:
        """Nothing is awaited of this call any more."""
        if self._ended:
            return
        self._ended = True
        self.stayed = None
        if self._awaited:
            self.tiered.awaited_no_more(self.unit, id(self))
        activations = self.tiered.activations
        for kept in self._kept:
            if kept is not None and activations is not None:
                activations.drop(kept)
        self._kept = []

    # -- forward ---------------------------------------------------------------------------------------------------------

    def run(self, tensors: Sequence[Tensor], given: tuple[tuple[Any, ...], dict[str, Any]] | None = None) -> list[Tensor]:
        """The forward pass alone, under whatever gradient mode is on; nothing is kept.

        Args:
            tensors: Among the arguments.
            given: The arguments themselves, which the unit may fill (a cache of keys) where they are not split.
        """

        def compute(index: int, chunk: list[Tensor]) -> Any:
            if given is None or self.arguments.sizes is not None:
                result = self._once(chunk)
            else:
                with self._autocast.again():
                    result = self._forward(*given[0], **given[1])
            if torch.is_grad_enabled() and not self.unit.trainable:
                self._check_closed(result, ())
            return result

        with self._placed(requires_grad=torch.is_grad_enabled()):
            return self._all(tensors, compute)

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The forward pass of training: results without their graph, and what it takes to compute them again."""
        self._num_inputs = len(tensors)
        self._training = [module.training for module, _, _ in self.unit.census]
        watched = _Buffers(self.unit, self.tiered)
        never = functools.partial(_never, self.unit.name)

        def compute(index: int, chunk: list[Tensor]) -> Any:
            generators = Generators.now(self.tiered.device)
            watched.note()
            mine = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in chunk]
            for tensor in mine:
                if tensor.requires_grad:
                    tensor.register_hook(never)
            with torch.autograd.graph.saved_tensors_hooks(_forget, never), self._inputs_unchanged(chunk):
                result = self._once(mine)
            if not index:
                self._check_closed(result, [*leaves.values(), *mine])
            self._buffers.append(watched.changed())
            self._random.append(None if generators.are_now(self.tiered.device) else generators)
            if self.arguments.count > 1 and torch._C._current_graph_task_id() < 0:  # not in a backward pass that computes a part once more
                self.tiered.ahead(self.unit, index + 1, self.arguments.count)
            return result

        with torch.enable_grad(), self._placed() as leaves:
            for leaf in leaves.values():
                if leaf.requires_grad:
                    leaf.register_hook(never)
            return self._all(tensors, compute)

    def _check_closed(self, result: Any, allowed: Iterable[Tensor]) -> None:
        """Refuse results through which a gradient would have to reach anything else. See [Note: Only through the door].

        Raises:
            TrainingError: There is such a way.
        """
        mine = {id(tensor) for tensor in allowed}
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
        ends: list[Any] = [tensor for tensor in found if tensor.grad_fn is None]
        nodes: list[Any] = [tensor.grad_fn for tensor in found if tensor.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            below = nodes.pop().next_functions
            for node, _ in below:
                if node is None or node in seen:
                    continue
                seen.add(node)
                if node.next_functions:
                    nodes.append(node)
                else:
                    ends.append(getattr(node, "variable", None))
        if any(end is not None and id(end) not in mine for end in ends):
            raise TrainingError(
                f"{self.unit.name!r} computes with a tensor that needs a gradient and is neither an argument nor a parameter of its own",
                need="all that needs a gradient among its arguments: in tuples, lists, dicts, or classes registered with torch's pytree",
                have="one from an attribute, a closure, an object of another class, or the parameters of a module that is not below it",
                remedy="pass it as an argument, or detach() it",
            )

    @contextlib.contextmanager
    def _inputs_unchanged(self, chunk: Sequence[Tensor]) -> Iterator[None]:
        """Refuse a forward pass that writes into its inputs: the backward pass computes with them once more.

        Raises:
            TrainingError: It did, or tried to.
        """
        versions = [tensor._version for tensor in chunk]
        cause: RuntimeError | None = None
        try:
            yield
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            cause = error
        if cause is not None or versions != [tensor._version for tensor in chunk]:
            raise TrainingError(
                f"{self.unit.name!r} writes into a tensor that it was given",
                need="arguments that stay as they are: the backward pass computes with them once more",
                remedy="write x = x + y in place of x += y, or clone the argument first",
            ) from cause

    def await_backward(self) -> None:
        self._awaited = True
        self.tiered.await_backward(self.unit, id(self))

    def _all(self, tensors: Sequence[Tensor], compute: Callable[[int, list[Tensor]], Any]) -> list[Tensor]:
        """Run every micro-batch. Returns the tensors of the results, free of graph and lease."""
        pieces: list[list[Tensor]] = []
        for index in range(self.arguments.count):
            outputs, found = take_outputs_apart(compute(index, self.arguments.of_micro_batch(tensors, index)))
            if self.outputs is None:
                self.outputs = outputs
            else:
                check_alike(self.outputs, outputs, self.unit.name)
            pieces.append([self.tiered.free_of_lease(tensor).detach() for tensor in found])
        if self.arguments.sizes is None:
            return pieces[0]
        with torch.no_grad():
            return join(pieces, self.arguments.rows_out, self.unit.name)

    def _once(self, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.arguments.rebuild(tensors)
        with self._autocast.again():
            result = self._forward(*args, **kwargs)
        self.arguments.check_unchanged(args, kwargs, tensors, self.unit.name)
        return result

    @contextlib.contextmanager
    def _placed(self, requires_grad: bool = True) -> Iterator[dict[Weight, Tensor]]:
        """Lease the unit's blocks and put the parameters into their places."""
        with self.tiered.leased(self.unit, requires_grad) as leaves:
            yield leaves

    # -- between ---------------------------------------------------------------------------------------------------------

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Move inputs to the store that are to wait there. Returns those that stay on the device."""
        activations = self.tiered.activations
        stay: list[Tensor] = []
        for tensor in tensors:
            if activations is not None and activations.suits(tensor):
                self._kept.append(activations.keep(tensor))
            else:
                self._kept.append(None)
                stay.append(tensor)
        return stay

    def _inputs(self, stayed: Sequence[Tensor], *, again: bool) -> list[Tensor]:
        """All inputs, on the device; those in the store are given up there, unless they will be needed again."""
        activations = self.tiered.activations
        rest = iter(stayed)
        inputs: list[Tensor] = []
        for position, kept in enumerate(self._kept):
            if kept is None:
                inputs.append(next(rest))
                continue
            assert activations is not None
            if again:
                inputs.append(activations.look_at(kept))
            else:
                self._kept[position] = None
                inputs.append(activations.take(kept))
        return inputs

    # -- backward --------------------------------------------------------------------------------------------------------

    def backward(self, stayed: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Compute again and follow the gradients.

        Args:
            stayed: The inputs that `keep` returned.
            needs: For each input, whether its gradient is wanted.
            grads: By the outputs, and then by the copies of the inputs that need a gradient.

        Returns:
            The gradients by the inputs.
        """
        with self.follows() as again:
            return self._backward(stayed, needs, grads, again=again)

    @contextlib.contextmanager
    def follows(self) -> Iterator[bool]:
        """A backward pass through this call. Yields whether another one may follow (`retain_graph`)."""
        again: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        before = self.tiered.buffers.acting_for(self._owner)
        try:
            self.tiered._check_attached()
            self.tiered.settle(self.unit.blocks)  # what was put off is a change of weights all the same
            self._check()
            with ordinary_tensors():
                yield again
        finally:
            if not again:
                self._end()
            self.tiered.buffers.back_to(before)

    def _check(self) -> None:
        name = self.unit.name
        if torch.is_grad_enabled():
            raise TrainingError(f"{name!r}: create_graph=True, a gradient of gradients", remedy="leave create_graph out")
        if self._ended:
            raise TrainingError(f"a second backward pass through one forward pass of {name!r}", remedy="run the forward pass again")
        for block, version in zip(self.unit.blocks, self._versions, strict=True):
            if self.tiered.version_of(block) != version:
                remedy = "call step(), or write to weights, after the backward passes of all forward passes made before"
                raise TrainingError(f"the weights of {name!r} were changed between its forward and its backward pass", remedy=remedy)

    def _backward(
        self, stayed: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None], *, again: bool
    ) -> list[Tensor | None]:
        assert self.outputs is not None
        arguments, tiered = self.arguments, self.tiered
        count = len(self.outputs.where)
        by_outputs, by_copies = grads[:count], iter(grads[count:])
        passed: list[Tensor | None] = [next(by_copies) if need else None for need in needs]
        inputs = self._inputs(stayed, again=again)
        wanted = tiered.wants_gradients()
        sums = tiered.sums_so_far(self.unit) if wanted else {}
        found: list[Tensor | None] = [
            None if split and arguments.sizes else grad for grad, split in zip(passed, arguments.splits, strict=True)
        ]
        chunks: list[list[Tensor | None]] = []
        ours: set[Weight] = set()
        with torch.enable_grad(), tiered.leased(self.unit, wanted) as leaves, self._as_before() as put_back:
            for index in reversed(range(arguments.count)):
                chunk = [
                    tensor.detach().requires_grad_(need)
                    for tensor, need in zip(arguments.of_micro_batch(inputs, index), needs, strict=True)
                ]
                put_back(index)
                outputs, results = take_outputs_apart(self._once(chunk))
                roots = [
                    (tensor, grad)
                    for tensor, grad in zip(results, self._of_micro_batch(by_outputs, index), strict=True)
                    if grad is not None
                ]
                chunks.append(self._follow(roots, leaves, sums, chunk, needs, found, ours))
                del outputs, results, roots, chunk
                tiered.between(index + 1)
        if wanted:
            tiered.add_gradients(self.unit, sums, spread=arguments.count > 1)
        if arguments.sizes is not None:
            for position, split in enumerate(arguments.splits):
                if split and needs[position]:
                    found[position] = _put_together(
                        [chunk[position] for chunk in reversed(chunks)], inputs[position], arguments.sizes, passed[position]
                    )
        return found

    def _of_micro_batch(self, grads: Sequence[Tensor | None], index: int) -> list[Tensor | None]:
        if self.arguments.sizes is None:
            return list(grads)
        sizes = self.arguments.rows_out
        start = sum(sizes[:index])
        return [None if grad is None else grad.narrow(0, start, sizes[index]) for grad in grads]

    def _follow(
        self,
        roots: list[tuple[Tensor, Tensor]],
        leaves: dict[Weight, Tensor],
        sums: Sums,
        chunk: list[Tensor],
        needs: Sequence[bool],
        found: list[Tensor | None],
        ours: set[Weight],
    ) -> list[Tensor | None]:
        """Gradients of one micro-batch. Adds to `sums`, and to `found` for what is not split.

        `ours` are the parameters whose sum was made by an earlier micro-batch. One that comes out of the store is not added to in place: it
        may lie there in another order of elements, and what adds them all up later would come to other last bits.

        Returns:
            The gradients by the rows of this micro-batch, where an input is split.
        """
        splits = [split and self.arguments.sizes is not None for split in self.arguments.splits]
        roots = [(tensor, grad) for tensor, grad in roots if tensor.requires_grad]
        weights = [weight for weight, leaf in leaves.items() if leaf.requires_grad]
        wanted = [position for position, need in enumerate(needs) if need]
        sources = [leaves[weight] for weight in weights] + [chunk[position] for position in wanted]
        if not roots or not sources:
            return [None] * len(chunk)
        seeds: list[tuple[Tensor, Tensor]] = []
        added_to = {weight: leaves[weight] for weight in weights if weight in ours}
        if added_to and _comes_first(roots, [*added_to.values()]):
            token: Tensor = _Sums.apply([sums.pop(weight) for weight in added_to], *added_to.values())  # type: ignore[no-untyped-call]
            seeds.append((token, token.detach()))
        seeds += [(leaves[weight], sums[weight]) for weight in weights if weight in sums]
        for position in wanted:
            grad = found[position]
            if not splits[position] and grad is not None:
                seeds.append((chunk[position], grad))
        results = torch.autograd.grad(
            [tensor for tensor, _ in [*seeds, *roots]], sources, [grad for _, grad in [*seeds, *roots]], allow_unused=True
        )
        for weight, grad in zip(weights, results, strict=False):
            if grad is not None:
                sums[weight] = _without_base(grad) if self.arguments.count > 1 and weight not in ours else grad
                ours.add(weight)
        rows: list[Tensor | None] = [None] * len(chunk)
        for position, grad in zip(wanted, results[len(weights) :], strict=True):
            if splits[position]:
                rows[position] = grad
            else:
                found[position] = grad
        return rows

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[Callable[[int], None]]:
        """Have all be as it was in the forward pass, before each micro-batch of it; afterwards, as it is now.

        That is: random numbers, buffers, whether modules are in training mode, and which kernels attention may take.
        """
        device = self.tiered.device
        modules = [module for module, _, _ in self.unit.census]
        switched = [module for module, before in zip(modules, self._training, strict=True) if module.training != before]
        drawn = any(generators is not None for generators in self._random)
        now = Generators.now(device) if drawn else None
        present = {(module, name): module._buffers[name] for changed in self._buffers for module, name in changed}

        def put_back(index: int) -> None:
            generators = self._random[index]
            if generators is not None:
                generators.set(device)
            for (module, name), value in self._buffers[index].items():
                module._buffers[name] = None if value is None else value.clone()

        try:
            for module in switched:
                module.training = not module.training
            with self._attention.again():
                yield put_back
        finally:
            for module in switched:
                module.training = not module.training
            for (module, name), buffer in present.items():
                module._buffers[name] = buffer
            if now is not None:
                now.set(device)


def _comes_first(roots: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> bool:
    """Whether a node made after all others is the first to give these leaves a gradient.

    Roots that are leaves are given theirs at once, and each device has a thread of its own. Nodes that a layer makes on several threads
    are not told apart.
    """
    return all(not root.is_leaf and root.device == leaf.device for root, _ in roots for leaf in leaves[:1])


def _without_base(tensor: Tensor) -> Tensor:
    """The same elements, as no view: autograd adds in place only to what has its storage to itself, and the base of a view has it too.

    What is only a part of its base stays as it is, since all of that would live on; and so does what is negated or conjugated when read.
    """
    base = tensor._base
    if base is None or tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor() or base.nbytes != tensor.nbytes:
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor)  # type: ignore[call-overload, no-any-return]


class _Sums(torch.autograd.Function):
    """Sums, as the first of the gradients by their leaves. See [Note: A unit in the graph]."""

    @staticmethod
    def forward(ctx: Any, sums: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.sums = sums
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        handed_over = (None, *ctx.sums)
        ctx.sums.clear()
        return handed_over


def _put_together(chunks: list[Tensor | None], whole: Tensor, sizes: Sequence[int], passed: Tensor | None) -> Tensor | None:
    """The gradient by an input that was split, from those by its rows; `passed` is what later uses of it came to."""
    if all(chunk is None for chunk in chunks):
        return passed
    rows = [chunk if chunk is not None else whole.new_zeros((size, *whole.shape[1:])) for chunk, size in zip(chunks, sizes, strict=True)]
    total = torch.cat(rows)
    return total if passed is None else passed + total


def _forget(tensor: Tensor) -> None:
    return None


def _never(unit: str, _: object) -> NoReturn:
    raise TrainingError(
        f"a gradient came upon what {unit!r} has left behind of its forward pass, whose graph is not kept",
        need="what needs a gradient among what forward() returns: in tuples, lists, dicts, or classes registered with torch's pytree",
        have="a tensor kept in an attribute (an auxiliary loss), given to a hook, in an object of another class, or differentiated within",
        remedy="return it, or detach() it",
    )


class _Buffers:
    """Watches the buffers of a unit over its forward pass."""

    LARGE = 1 << 16
    """Buffers of more bytes that were never seen to change (causal masks) are not copied each time."""

    def __init__(self, unit: Unit, tiered: Tiered) -> None:
        self._unit = unit
        self._still = tiered.still_buffers
        self._noted: dict[Buffer, tuple[Tensor | None, int, Tensor | None]] = {}

    def note(self) -> None:
        self._noted = {}
        for module, name in self._unit.buffers:
            buffer = module._buffers.get(name)
            if buffer is None:
                self._noted[module, name] = (None, 0, None)
            else:
                small = buffer.numel() * buffer.element_size() <= self.LARGE
                copied = small or (module, name) not in self._still or isinstance(module, _NormBase)
                self._noted[module, name] = (buffer, buffer._version, buffer.detach().clone() if copied else None)

    def changed(self) -> dict[Buffer, Tensor | None]:
        """What those buffers held that have changed since, or may have: batch norm updates its statistics behind autograd's back."""
        found: dict[Buffer, Tensor | None] = {}
        for (module, name), (buffer, version, copy) in self._noted.items():
            if buffer is None:
                if module._buffers.get(name) is not None:
                    found[module, name] = None
            elif module._buffers.get(name) is buffer and buffer._version == version:
                self._still.add((module, name))
                if copy is not None and copy.is_floating_point():
                    found[module, name] = copy
            elif copy is None and buffer._version == version:  # another was put into its place, and it is as it was
                found[module, name] = buffer
            elif copy is None:
                raise TrainingError(f"buffer {name!r} in {self._unit.name!r} changes in some forward passes only", remedy="attach() again")
            else:
                found[module, name] = copy
        return found


def check_splittable(unit: Unit) -> None:
    """Refuse to split what looks at all rows at once.

    Raises:
        TrainingError: Batch statistics.
    """
    for name, module in unit.batch_norms:
        if module.training:
            raise TrainingError(
                f"layer {unit.name!r} cannot be split into micro-batches: {name or 'it'} takes statistics over the batch",
                remedy="leave micro_batch= out, or use a norm that looks at each row by itself",
            )


class _Run(torch.autograd.Function):
    """See [Note: A unit in the graph]."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor | None, *last_first: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors = last_first[::-1]
        results = call.first(tensors)
        assert call.outputs is not None
        ctx.call = call
        ctx.needs = [tensor.requires_grad for tensor in tensors]
        # Not the inputs themselves, which would live as long as the graph, and the graph with `Tiered.note_copy`'s copies as long as they.
        ctx.save_for_backward(*call.keep([tensor.detach() for tensor in tensors]))
        flows = call.outputs.differentiable
        ctx.mark_non_differentiable(*[tensor for tensor, differentiable in zip(results, flows, strict=True) if not differentiable])
        call.await_backward()
        return (*results, *[tensor.detach() for tensor in tensors if tensor.requires_grad])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        assert call.outputs is not None
        count = len(call.outputs.where)
        if all(grad is None for grad in grads[:count]):  # a pass through later uses of its inputs alone, maybe after its own
            if not call.has_ended and call.stayed is None:
                call.stayed = ctx.saved_tensors  # autograd lets go of them with this pass
            by_copies = iter(grads[count:])
            return (None, None, *reversed([next(by_copies) if need else None for need in ctx.needs]))
        stayed = ctx.saved_tensors if call.stayed is None else call.stayed
        return (None, None, *reversed(call.backward(stayed, ctx.needs, grads)))


def run_unit(
    tiered: Tiered,
    unit: Unit,
    forward: Callable[..., Any],
    arguments: Arguments,
    tensors: list[Tensor],
    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
) -> Any:
    """Run a unit whose arguments, `given`, have been taken apart."""
    call = Call(tiered, unit, forward, arguments)
    needed = torch.is_grad_enabled() and (unit.trainable or any(tensor.requires_grad for tensor in tensors))
    if not needed:
        results = call.run(tensors, given)
        assert call.outputs is not None
        return call.outputs.rebuild(results)
    # Last first: of a tensor that is given twice, autograd adds the gradients in the order of a node's inputs, and of its uses last first.
    copies = [tiered.latest_copy(tensor) for tensor in reversed(tensors)]
    found = _Run.apply(call, tiered.anchor if unit.trainable else None, *copies)  # type: ignore[no-untyped-call]
    assert call.outputs is not None
    count = len(call.outputs.where)
    needy = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor, copy in zip(needy, found[count:], strict=True):
        tiered.note_copy(tensor, copy, call)
    return call.outputs.rebuild(found[:count])


class _Copies(torch.autograd.Function):
    """Copies of what a scope owns, for its own forward pass; their gradients are those of the parameters."""

    @staticmethod
    def forward(ctx: Any, tiered: Tiered, unit: Unit, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = Call(tiered, unit, unit.module.forward, Arguments(None, [], [], []))  # type: ignore[arg-type]
        with tiered.leased(unit, place=False) as leaves:
            copies = [leaf.detach().clone() for leaf in leaves.values()]
        ctx.weights = list(leaves)
        ctx.mark_non_differentiable(*[copy for copy, weight in zip(copies, ctx.weights, strict=True) if not weight.requires_grad])
        ctx.call.await_backward()
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None]:
        call: Call = ctx.call
        tiered, unit = call.tiered, call.unit
        with call.follows():
            if tiered.wants_gradients():
                sums = tiered.sums_so_far(unit)
                for weight, grad in zip(ctx.weights, grads, strict=True):
                    if grad is not None:
                        sums[weight] = sums[weight] + grad if weight in sums else grad
                tiered.add_gradients(unit, sums)
        return None, None, None


def copies_for(tiered: Tiered, unit: Unit) -> dict[Weight, Tensor]:
    """Copies of what a scope owns, with a way back for their gradients."""
    assert unit.kind is Kind.SCOPE
    weights = list(dict.fromkeys(weight for _, _, weight in unit.places))
    if torch.is_grad_enabled() and unit.trainable:
        copies = _Copies.apply(tiered, unit, tiered.anchor)  # type: ignore[no-untyped-call]
    else:
        with tiered.leased(unit, place=False) as leaves:
            copies = tuple(leaves[weight].detach().clone() for weight in weights)
    return dict(zip(weights, copies, strict=True))
