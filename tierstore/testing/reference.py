"""The resident reference: the training that a streamed one is compared with, bit for bit. Plain torch, nothing of tierstore.

Everything stays where the user put it and torch does all the work: its checkpointing, its autograd, its optimizers, its clipping. The few
rules that plain torch leaves open (how a batch is cut, where masters come in, in which order norms are stacked) are stated below and
written as the shortest loop that follows them.

    reference = resident_reference(model, model.layers, micro_batch=4)
    optimizer = reference.optimizer(torch.optim.AdamW, lr=3e-4, master_dtype=torch.float32)
    for batch in data:
        model(batch).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

Group = dict[str, Any]


def resident_reference(
    model: nn.Module, layers: Iterable[nn.Module] | None = None, *, micro_batch: int | None = None, split: Iterable[str] | None = None
) -> Reference:
    """Make a resident model compute exactly what it is defined to compute when it is streamed.

    With `micro_batch=None` nothing is changed: the reference is the unmodified loop. Otherwise the `forward` of each layer is replaced, in
    place, by that of [Note: Micro-batches], until `detach()`.

    Args:
        model: An ordinary module, resident.
        layers: Modules within the model, none inside another. One that is listed or used more than once is replaced once.
        micro_batch: Rows of a micro-batch; the last one may have fewer.
        split: Names of parameters of the layers' `forward` whose tensors may be split; None means all. A tensor whose first dimension
            happens to equal the batch (a mask of batch x batch elements) cannot be told from one that holds rows: leave it out here.

    Raises:
        ValueError: What is asked for cannot be meant: no layers to split, a layer that is not in the model, ...
    """
    return Reference(model, layers, micro_batch, split)


# [Note: Micro-batches]
# A call `layer(x)` becomes torch.cat([checkpoint(layer, chunk) for chunk in x.split(micro_batch)]) with use_reentrant=False and
# preserve_rng_state=True. So the forward draws random numbers in the order of the chunks, and recomputation draws the same ones again.
#
# In general: the batch is the first dimension of the first tensor among the positional arguments (if there is none, among the keyword
# arguments). Tensors that have the batch as first dimension are split, also inside tuples, lists and dicts, unless `split` leaves their
# argument out; everything else goes to every chunk as it is. Of what the layer returns, tensors are concatenated (each must have its
# chunk's batch as first dimension), tuples, lists and dicts are rebuilt, and anything else must be equal in all chunks.
#
# Without gradients the batch is split in the same way, with nothing to recompute. Hooks registered on a layer see the whole batch, once.
# Batch norm that uses statistics of the batch is refused. Buffers that a layer changes are changed once per chunk, in the order of the
# chunks: a recomputation sees them as its chunk's forward found them, and leaves no trace in them.
#
# Autocast must have its cache off: `torch.autocast(..., cache_enabled=False)`. With it on, all micro-batches would share one cast of each
# weight, and their gradients would be summed in the low precision.
#
# [Note: The order of a sum]
# All this is what autograd does by itself, stated here because streaming has to repeat it. Backward visits chunks last to first, and
# within a chunk the operations in reverse order. Contributions to one parameter within one backward, whatever layers and chunks they come
# from, are added one by one in this order, in the gradient's dtype; their sum is then added to what `grad` held. Uses that share a view of
# the parameter (`t = w.t(); x @ t @ t`) make one contribution: their sum.


class Reference:
    """What `resident_reference` returns. It holds no state of training; `optimizer()` may be called more than once."""

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module] | None, micro_batch: int | None, split: Iterable[str] | None) -> None:
        self.model = model
        self.layers = tuple(dict.fromkeys(layers or ()))
        self.micro_batch = micro_batch
        self._stand_ins: list[tuple[nn.Module, _Split, Any]] = []
        names = {module: name for name, module in model.named_modules()}
        _check_layers(self.layers, names)
        if micro_batch is None:
            if split is not None:
                raise ValueError(
                    "split= says which arguments are split into micro-batches, but micro_batch= is None: give both, or neither"
                )
            return
        if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
            raise ValueError(f"micro_batch= needs a number of rows, 1 or more, but is {micro_batch!r}")
        if not self.layers:
            raise ValueError("micro_batch= needs layers to split: pass layers=")
        splittable = None if split is None else frozenset([split] if isinstance(split, str) else split)
        stand_ins = [_Split(names[layer], layer, micro_batch, splittable) for layer in self.layers]
        for name in splittable or ():
            if not any(_takes(stand_in.__signature__, name) for stand_in in stand_ins):
                raise ValueError(f"split= names {name!r}, but no layer's forward has such a parameter: {stand_ins[0].__signature__}")
        for layer, stand_in in zip(self.layers, stand_ins, strict=True):
            self._stand_ins.append((layer, stand_in, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = stand_in

    def detach(self) -> None:
        """Give the layers back the `forward` they had. A second call does nothing."""
        for layer, stand_in, _ in self._stand_ins:
            if layer.__dict__.get("forward") is not stand_in:
                raise RuntimeError(f"the forward of layer {stand_in.name!r} was replaced since by something else: take that away first")
        for layer, _, before in self._stand_ins:
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before
        self._stand_ins.clear()

    def optimizer(
        self,
        factory: Callable[..., torch.optim.Optimizer],
        *,
        params: Iterable[nn.Parameter] | Iterable[Group] | None = None,
        master_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> ReferenceOptimizer:
        """Build the optimizer: one instance for the whole set, so that torch itself chooses between foreach, fused and single.

        Args:
            factory: A class of optimizers, or anything callable as `factory(params, **options)`.
            params: Parameters or group dicts, as torch takes them. None: all of the model that require gradients.
            master_dtype: None runs the optimizer on the parameters themselves. Otherwise it runs on copies in this dtype, the masters.
            **options: Passed to the factory.

        Raises:
            ValueError: A parameter is not one of the model's.
        """
        return ReferenceOptimizer(self.model, self.layers, factory, params, master_dtype, options)


def _check_layers(layers: Sequence[nn.Module], names: Mapping[nn.Module, str]) -> None:
    for layer in layers:
        if layer not in names:
            raise ValueError(f"layers= needs modules of the model, but a {type(layer).__name__} is not one of them")
        if isinstance(layer.__dict__.get("forward"), _Split):
            raise ValueError(f"layer {names[layer]!r} is split already: detach() the other reference first")
        for inner in layers:
            if inner is not layer and inner in layer.modules():
                raise ValueError(f"layer {names[inner]!r} lies inside layer {names[layer]!r}: leave one of them out")


def _takes(signature: inspect.Signature, name: str) -> bool:
    return name in signature.parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())


class _Split:
    """Stands where a layer's `forward` was. Not a closure, so that a deep copy of the model gets one that runs the copied layer."""

    def __init__(self, name: str, layer: nn.Module, micro_batch: int, splittable: frozenset[str] | None) -> None:
        self.name = name
        self.layer = layer
        self.micro_batch = micro_batch
        self.splittable = splittable
        self.forward: Callable[..., Any] = layer.forward
        # What callers see who ask the layer for its parameters.
        self.__signature__ = inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_batch_norm()
        leading = next(_tensors([*args, *kwargs.values()]), None)
        if leading is None or leading.dim() == 0:
            raise ValueError(f"layer {self.name!r} needs a tensor with a batch dimension to be split, but its first tensor is {leading!r}")
        sizes = [len(chunk) for chunk in leading.split(self.micro_batch)]
        chunked_args = [self._chunks(name, value, sizes) for name, value in zip(self._positional(len(args)), args, strict=True)]
        chunked_kwargs = {name: self._chunks(name, value, sizes) for name, value in kwargs.items()}
        run = self._run
        if torch.is_grad_enabled():
            device = leading.device.type
            if torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled():
                raise RuntimeError(
                    f"layer {self.name!r} is split under autocast with its cache on: pass cache_enabled=False to torch.autocast"
                )
            run = self._checkpointed
        outputs = []
        for index in range(len(sizes)):
            chunk_args = [chunks[index] for chunks in chunked_args]
            outputs.append(run(chunk_args, {name: chunks[index] for name, chunks in chunked_kwargs.items()}))
        return self._join(outputs, sizes, "its output")

    def _run(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        return self.forward(*args, **kwargs)

    def _checkpointed(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        before = _buffers_of(self.layer)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _Buffers(before)

        # Arguments go inside a list and a dict, so that no keyword of the layer is taken for one of checkpoint's.
        return checkpoint(self._run, args, kwargs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)

    def _refuse_batch_norm(self) -> None:
        for name, module in self.layer.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"layer {self.name!r} cannot be split: {name or 'it'} is a {type(module).__name__} that uses statistics of the batch; "
                    f"use micro_batch=None, leave the layer out, or put it into eval()"
                )

    def _positional(self, count: int) -> list[str]:
        """Names of the parameters that take the first `count` positional arguments."""
        names: list[str] = []
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names.extend([parameter.name] * (count - len(names)))
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
        if len(names) < count:
            raise TypeError(f"the forward of layer {self.name!r} takes {self.__signature__}, but was given {count} positional arguments")
        return names[:count]

    def _chunks(self, name: str, value: Any, sizes: list[int]) -> list[Any]:
        """What each chunk gets of one argument."""
        if self.splittable is not None and name not in self.splittable:
            return [value] * len(sizes)
        if isinstance(value, Tensor):
            # One split per tensor: its backward is then one concatenation, with no sum in it.
            return list(value.split(self.micro_batch)) if value.dim() > 0 and len(value) == sum(sizes) else [value] * len(sizes)
        if _is_container(value):
            items = [self._chunks(name, item, sizes) for item in _items(value)]
            return [_rebuilt(value, [chunks[index] for chunks in items]) for index in range(len(sizes))]
        return [value] * len(sizes)

    def _join(self, values: list[Any], sizes: list[int], what: str) -> Any:
        first = values[0]
        if any(type(value) is not type(first) for value in values):
            kinds = sorted({type(value).__name__ for value in values})
            raise ValueError(
                f"layer {self.name!r} cannot be split: {what} is of another type in different micro-batches: {', '.join(kinds)}"
            )
        if isinstance(first, Tensor):
            for value, size in zip(values, sizes, strict=True):
                if value.dim() == 0 or len(value) != size:
                    raise ValueError(
                        f"layer {self.name!r} cannot be split: of a micro-batch of {size} rows {what} needs {size} rows, but has "
                        f"the shape {tuple(value.shape)}, so that it is not known how to put the parts together"
                    )
            return torch.cat(values)
        if _is_container(first):
            if any(_keys(value) != _keys(first) for value in values):
                raise ValueError(f"layer {self.name!r} cannot be split: {what} has other items in different micro-batches")
            columns = zip(*(_items(value) for value in values), strict=True)
            keys = _keys(first)
            return _rebuilt(first, [self._join(list(column), sizes, f"{what}[{key!r}]") for key, column in zip(keys, columns, strict=True)])
        for value in values:
            if not (value is first or value == first):
                raise ValueError(f"layer {self.name!r} cannot be split: {what} is {first!r} in one micro-batch and {value!r} in another")
        return first


def _is_container(value: Any) -> bool:
    return isinstance(value, tuple | list | dict)


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


def _rebuilt(like: Any, items: list[Any]) -> Any:
    """A container of the same type with other items."""
    if isinstance(like, dict):
        # Copied, since what else its class needs (the factory of a defaultdict) is not known.
        fresh = copy.copy(like)
        for key, item in zip(_keys(like), items, strict=True):
            fresh[key] = item
        return fresh
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif _is_container(value):
        for item in _items(value):
            yield from _tensors(item)


Buffers = list[tuple[nn.Module, str, Tensor]]


def _copies(buffers: Buffers) -> Buffers:
    """The same places with copies in them; a tensor that stands in several places is copied once."""
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in buffers}
    return [(module, name, copies[id(buffer)]) for module, name, buffer in buffers]


def _buffers_of(layer: nn.Module) -> Buffers:
    """Copies of a layer's buffers."""
    modules = layer.modules()
    return _copies([(module, name, buffer) for module in modules for name, buffer in module.named_buffers("", False, False)])


class _Buffers(AbstractContextManager[None]):
    """While it is entered, a layer works on copies of its buffers as they were before. Entered once per recomputation."""

    def __init__(self, before: Buffers) -> None:
        self.before = before
        self.present: Buffers = []

    def __enter__(self) -> None:
        self.present = [(module, name, getattr(module, name)) for module, name, _ in self.before]
        self._put(_copies(self.before))

    def __exit__(self, *_: object) -> None:
        self._put(self.present)

    @staticmethod
    def _put(buffers: Buffers) -> None:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


# [Note: Masters]
# With `master_dtype` the optimizer holds a copy of every parameter in that dtype, and works on the copies alone. A step widens each
# gradient to the master's dtype, lets the optimizer step, and narrows each master into its parameter with copy_(). A parameter without a
# gradient is left out: neither its master, nor its state, nor its value changes.
#
# Clipping widens first, and norms and scales the widened gradients. They are what the next step uses, and that step only: `grad` stays as
# backward left it, unclipped and narrow. Clipping twice before a step clips what is clipped, as in torch. A gradient that changes between
# clipping and the step (another backward) would have to join what is clipped already; this is refused. Without masters it is allowed, and
# means what it means in torch: what came first is clipped, what came later is not.
#
# [Note: The norm]
# Norms are those of torch.nn.utils.get_total_norm over gradients in the order of model.parameters(), whatever the order of the groups:
# the norm of the stacked norms of the tensors. Where gradients have several dtypes (never so with masters) torch stacks them dtype by
# dtype, and so does the reference. Parameters without a gradient do not count; where none has one, the norm is 0.
#
# scope="layer" clips each group of parameters by itself. The groups are: the parameters of each layer; the parameters of each outermost
# module that is no layer, contains none and lies in none; and what a module that does contain layers holds directly. A parameter that
# several layers share belongs to the first of them in `layers`; one that a layer and others share belongs to the layer; else the first
# module counts. Groups stand in the order of their first parameter in model.parameters(); those of which the optimizer has no parameter
# are left out.


class ReferenceOptimizer:
    """An optimizer of torch, with masters if it has a `master_dtype`.

    Attributes:
        inner: The optimizer of torch. Learning-rate schedulers take this one.
        parameters: The model's parameters that it updates, in the order of model.parameters().
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        factory: Callable[..., torch.optim.Optimizer],
        params: Iterable[nn.Parameter] | Iterable[Group] | None,
        master_dtype: torch.dtype | None,
        options: Mapping[str, Any],
    ) -> None:
        given = [_listed(entry) for entry in (params if params is not None else (p for p in model.parameters() if p.requires_grad))]
        chosen = {parameter for entry in given for parameter in (entry["params"] if isinstance(entry, dict) else [entry])}
        self.parameters = [parameter for parameter in model.parameters() if parameter in chosen]
        if len(self.parameters) < len(chosen):
            raise ValueError(f"params= needs parameters of the model, but {len(chosen) - len(self.parameters)} of {len(chosen)} are not")
        self.master_dtype = master_dtype
        self._layer_groups = _layer_groups(model, layers) if layers else None
        # What the inner optimizer works on, by parameter: masters, or the parameters themselves.
        self._inner_of = {parameter: _master(parameter, master_dtype) if master_dtype else parameter for parameter in self.parameters}
        # By parameter, the gradient that was clipped and its version; None when nothing is clipped.
        self._clipped: dict[nn.Parameter, tuple[Tensor, int] | None] | None = None
        self.inner = factory([self._for_inner(entry) for entry in given], **options)

    @property
    def param_groups(self) -> list[Group]:
        """Those of the inner optimizer."""
        return self.inner.param_groups

    def step(self) -> None:
        """Update every parameter that has a gradient. With masters as in [Note: Masters]."""
        if self.master_dtype is None:
            self.inner.step()
            return
        self._widen()
        self.inner.step()
        with torch.no_grad():
            for parameter, master in self._inner_of.items():
                if master.grad is not None:
                    parameter.copy_(master)
                    master.grad = None
        self._clipped = None

    def zero_grad(self) -> None:
        """Set all gradients to None, clipped ones included."""
        for parameter, inner in self._inner_of.items():
            parameter.grad = inner.grad = None
        self._clipped = None

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        *,
        scope: Literal["global", "layer"] | Iterable[Iterable[nn.Parameter]] = "global",
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clip the gradients as torch.nn.utils.clip_grad_norm_ does, in the order of [Note: The norm].

        Args:
            max_norm: What a norm may be at most.
            norm_type: The p of the norm.
            scope: "global" is one norm over all parameters. "layer" is one, and one coefficient, per group of [Note: The norm]. Lists of
                parameters are groups of one's own; what they leave out is not clipped.
            error_if_nonfinite: Raise on a norm that is not finite, before anything is clipped.

        Returns:
            The norm before clipping, shape (); for any scope but "global" one norm per group, shape (groups,).
        """
        groups = self._groups(scope)
        if self.master_dtype is not None:
            self._widen()
        norms = []
        for group in groups:
            gradients = [inner.grad for inner in group if inner.grad is not None]
            norms.append(get_total_norm(gradients, norm_type, error_if_nonfinite))
        for group, norm in zip(groups, norms, strict=True):
            clip_grads_with_norm_(group, max_norm, norm)
        if self.master_dtype is not None:
            self._clipped = self._versions()
        return norms[0] if scope == "global" else torch.stack([norm.to(self.parameters[0].device) for norm in norms])

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the inner optimizer keeps about a parameter, by key; empty before its first step."""
        state: dict[str, Any] = self.inner.state.get(self._known(parameter), {})
        return state

    def master_of(self, parameter: nn.Parameter) -> Tensor | None:
        """The master of a parameter, None without masters."""
        return None if self.master_dtype is None else self._known(parameter)

    def _known(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in self._inner_of:
            raise ValueError(f"this optimizer does not update the given parameter of shape {tuple(parameter.shape)}")
        return self._inner_of[parameter]

    def _for_inner(self, entry: nn.Parameter | Group) -> nn.Parameter | Group:
        if isinstance(entry, dict):
            return {**entry, "params": [self._inner_of[parameter] for parameter in entry["params"]]}
        return self._inner_of[entry]

    def _widen(self) -> None:
        """Give each master the gradient of its parameter, unless it has a clipped one already."""
        if self._clipped is None:
            for parameter, master in self._inner_of.items():
                gradient = parameter.grad
                master.grad = None if gradient is None else gradient.detach().to(self.master_dtype, copy=True)
            return
        versions = self._versions()
        for parameter in self.parameters:
            if not _same(self._clipped[parameter], versions[parameter]):
                raise RuntimeError(
                    f"with master_dtype= gradients must not change between clip_grad_norm_() and step(), but that of a parameter of shape "
                    f"{tuple(parameter.shape)} has: clip after the last backward, or call zero_grad() first"
                )

    def _versions(self) -> dict[nn.Parameter, tuple[Tensor, int] | None]:
        return {parameter: None if parameter.grad is None else (parameter.grad, parameter.grad._version) for parameter in self.parameters}

    def _groups(self, scope: str | Iterable[Iterable[nn.Parameter]]) -> list[list[nn.Parameter]]:
        """Groups to be clipped, as what the inner optimizer works on, each in the order of model.parameters()."""
        if scope == "global":
            wanted: list[set[nn.Parameter]] = [set(self.parameters)]
        elif scope == "layer":
            if self._layer_groups is None:
                raise ValueError('scope="layer" needs to know the layers: pass layers= to resident_reference()')
            wanted = [group for group in map(set, self._layer_groups) if not group.isdisjoint(self.parameters)]
        elif isinstance(scope, str):
            raise ValueError(f'scope= needs "global", "layer" or lists of parameters, but is {scope!r}')
        else:
            wanted = [set(group) for group in scope]
            for parameter in set().union(*wanted):
                self._known(parameter)
                if sum(parameter in group for group in wanted) > 1:
                    raise ValueError(f"scope= has a parameter of shape {tuple(parameter.shape)} in two groups: it can be clipped only once")
        return [[self._inner_of[parameter] for parameter in self.parameters if parameter in group] for group in wanted]


def _listed(entry: nn.Parameter | Group) -> nn.Parameter | Group:
    """A group dict with its parameters as a list; torch also takes one tensor, or an iterator."""
    if not isinstance(entry, dict):
        return entry
    members = entry["params"]
    return {**entry, "params": [members] if isinstance(members, Tensor) else list(members)}


def _master(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=parameter.requires_grad)


def _same(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] == other[1]


def _layer_groups(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """All parameters of the model in the groups of [Note: The norm]."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for layer in layers:
        for parameter in layer.parameters():
            owners.setdefault(parameter, layer)
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in layers:
            continue
        contains = any(layer in module.modules() for layer in layers)
        for parameter in module.parameters(recurse=not contains):
            owners.setdefault(parameter, module)
        if contains:
            waiting.extend(reversed(list(module.children())))
    groups: dict[nn.Module, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(owners[parameter], []).append(parameter)
    return list(groups.values())


def capture(model: nn.Module, reference_optimizer: ReferenceOptimizer) -> dict[Any, Tensor]:
    """Clone what training has changed, to be compared with torch.equal later.

    Returns:
        Every parameter under its name; of those that the optimizer updates also all state under (name, key), numbers as tensors, and the
        master under (name, "master"). A shared parameter goes by its first name.
    """
    captured: dict[Any, Tensor] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in reference_optimizer.parameters:
        for key, value in reference_optimizer.state_of(parameter).items():
            if isinstance(value, Tensor | int | float):
                dtype = torch.float64 if isinstance(value, float) else None
                captured[names[parameter], key] = torch.as_tensor(value, dtype=dtype).detach().clone()
        master = reference_optimizer.master_of(parameter)
        if master is not None:
            captured[names[parameter], "master"] = master.detach().clone()
    return captured
