"""Access sequences of training and inference as real models have them: what is leased together, what is written, what it computes.

The sizes are those of published models; `RATE` stands for the GPU of a laptop. Nothing here is measured, and nothing is random but the
routing of the experts, which is drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from tierstore.catalog import PAGE
from tierstore.planner.simulate import Step

RATE = 27e12
"""Operations per second of a laptop's GPU in 16-bit arithmetic."""

MEMORY_RATE = 250e9
"""Bytes per second of its memory: what a small matrix product and an update are limited by."""

COUNTED = 3
"""Periods that are measured, the last ones: by then `lookahead` has recognised the period and planned for it."""

CHUNK_BYTES = 200_000_000
"""Optimizer state moves in chunks of at most this size: a third of a layer's."""


@dataclass(frozen=True)
class Workload:
    """A named sequence of leases.

    Attributes:
        title: For tables and plots.
        what: One sentence on where it comes from.
        blocks: Payload bytes by name.
        periods: The leases, cut where one period ends and the next begins.
        warm: Periods before counting begins: the policies learn and the tiers fill.
        repeats: Every period is the same.
        frozen: Blocks that are never written.
    """

    name: str
    title: str
    what: str
    blocks: Mapping[str, int]
    periods: tuple[tuple[Step, ...], ...]
    warm: int
    repeats: bool
    frozen: Collection[str] = field(default_factory=frozenset)

    @property
    def nbytes(self) -> int:
        return sum(self.blocks.values())

    @property
    def largest_lease(self) -> int:
        return max(sum(self.blocks[name] for name in step.blocks) for period in self.periods for step in period)

    @property
    def counted(self) -> tuple[tuple[Step, ...], ...]:
        return self.periods[self.warm :]


def lease(*blocks: str, writes: Collection[str] = (), seconds: float = 0.0) -> Step:
    return Step(blocks, frozenset(writes), round(seconds * 1e9))


def pages(nbytes: float) -> int:
    """A block's payload: whole pages."""
    return max(1, -(-int(nbytes) // PAGE)) * PAGE


@dataclass(frozen=True)
class Transformer:
    """A decoder's shape. The default is TinyLlama-1.1B: 22 layers of width 2048, 32,000 tokens, embedding and head apart.

    Attributes:
        layer, table: Parameters of a layer, and of the embedding (or the head).
        tokens: Of one training step.
    """

    layers: int = 22
    layer: int = 44_044_288
    table: int = 65_536_000
    width: int = 2048
    tokens: int = 4096

    @property
    def parts(self) -> list[str]:
        return ["embedding", *(f"layer{index}" for index in range(self.layers)), "head"]

    def parameters(self, part: str) -> int:
        return self.layer if part.startswith("layer") else self.table

    def forward_s(self, part: str) -> float:
        return 0.0005 if part == "embedding" else 2 * self.parameters(part) * self.tokens / RATE

    @property
    def activation_bytes(self) -> int:
        return pages(2 * self.tokens * self.width)


def full_finetune(model: Transformer, *, steps: int, evaluations: int = 0) -> Workload:
    """All weights learn: 16-bit weights and gradients, 12 bytes of fp32 AdamW state a parameter, in chunks, updated after backward."""
    blocks: dict[str, int] = {}
    chunks: dict[str, list[str]] = {}
    for part in model.parts:
        count = model.parameters(part)
        blocks[f"{part}.weights"] = blocks[f"{part}.gradients"] = pages(2 * count)
        num_chunks = -(-12 * count // CHUNK_BYTES)
        chunks[part] = [f"{part}.state{index}" for index in range(num_chunks)]
        blocks |= {name: pages(12 * count / num_chunks) for name in chunks[part]}
    blocks |= {f"{part}.input": model.activation_bytes for part in model.parts[1:]}
    forward = [
        lease(f"{part}.weights", *inputs, writes=inputs, seconds=model.forward_s(part))
        for part in model.parts
        for inputs in [[f"{part}.input"] if part != "embedding" else []]
    ]
    backward = [
        # the layer is computed once more, and its derivative costs two of its forwards
        lease(f"{part}.weights", f"{part}.gradients", *inputs, writes=[f"{part}.gradients"], seconds=3 * model.forward_s(part))
        for part in reversed(model.parts)
        for inputs in [[f"{part}.input"] if part != "embedding" else []]
    ]
    update = [
        lease(f"{part}.weights", f"{part}.gradients", name, writes=[f"{part}.weights", name], seconds=2.5 * blocks[name] / MEMORY_RATE)
        for part in model.parts
        for name in chunks[part]
    ]
    step = (*forward, *backward, *update)
    evaluation = tuple(lease(f"{part}.weights", seconds=model.forward_s(part)) for part in model.parts) * evaluations
    period = step + evaluation
    if evaluations:
        name, title = "evaluation", "evaluation in between"
        what = f"the full fine-tune, with {evaluations} forward passes over held-out text after every step"
    else:
        name, title = "full", "full fine-tune"
        what = "TinyLlama-1.1B, all weights learn: 16-bit weights and gradients, fp32 AdamW state in chunks, 4,096 tokens a step"
    return Workload(name, title, what, blocks, (period,) * steps, warm=steps - COUNTED, repeats=True)


def lora(model: Transformer, *, steps: int, rank: int = 16) -> Workload:
    """Frozen weights; small adapters, their gradients and their state learn."""
    adapter = rank * (7 * 2 * model.width + 3 * 5632 - 3 * model.width)  # two factors for each of a layer's seven matrices, roughly
    layers = [part for part in model.parts if part.startswith("layer")]
    blocks = {f"{part}.weights": pages(2 * model.parameters(part)) for part in model.parts}
    frozen = frozenset(blocks)
    for part in layers:
        blocks |= {f"{part}.adapter": pages(4 * adapter), f"{part}.gradients": pages(4 * adapter), f"{part}.state": pages(8 * adapter)}
    blocks |= {f"{part}.input": model.activation_bytes for part in model.parts[1:]}
    adapters = {part: [f"{part}.adapter"] if part in layers else [] for part in model.parts}
    inputs = {part: [f"{part}.input"] if part != "embedding" else [] for part in model.parts}
    forward = [
        lease(f"{part}.weights", *adapters[part], *inputs[part], writes=inputs[part], seconds=model.forward_s(part)) for part in model.parts
    ]
    backward = [
        lease(
            f"{part}.weights",
            *adapters[part],
            *inputs[part],
            *gradients,
            writes=gradients,
            seconds=2 * model.forward_s(part),
        )
        for part in reversed(model.parts[1:])
        for gradients in [[f"{part}.gradients"] if part in layers else []]
    ]
    update = [
        lease(f"{part}.adapter", f"{part}.gradients", f"{part}.state", writes=[f"{part}.adapter", f"{part}.state"], seconds=0.0001)
        for part in layers
    ]
    step = (*forward, *backward, *update)
    what = "the same model with its weights frozen and adapters of rank 16 in each layer"
    return Workload("lora", "LoRA", what, blocks, (step,) * steps, warm=steps - COUNTED, repeats=True, frozen=frozen)


def inference(model: Transformer, *, passes: int, sequences: int = 8, context: int = 4096) -> Workload:
    """One token for each of some sequences per pass: every weight is read, every layer's cache of keys and values grows."""
    weights = {f"{part}.weights": pages(2 * model.parameters(part)) for part in model.parts}
    blocks = dict(weights)
    blocks |= {f"{part}.cache": pages(sequences * context * 2 * 256 * 2) for part in model.parts[1:-1]}
    one = []
    for part in model.parts:
        cache = [f"{part}.cache"] if f"{part}.cache" in blocks else []
        nbytes = sum(blocks[name] for name in (f"{part}.weights", *cache))
        one.append(lease(f"{part}.weights", *cache, writes=cache, seconds=nbytes / MEMORY_RATE))
    what = "the same model answers 8 requests at once, a token each per pass, with 4,096 tokens of context"
    return Workload(
        "inference", "inference", what, blocks, (tuple(one),) * passes, warm=passes - COUNTED, repeats=True, frozen=frozenset(weights)
    )


def experts(*, passes: int, layers: int = 16, experts: int = 64, active: int = 8, sequences: int = 2, seed: int = 0) -> Workload:
    """A mixture of experts answers requests: which experts a token needs is skewed, and leans on the token before."""
    expert_bytes, attention_bytes = pages(2 * 3 * 2048 * 1024), pages(2 * 4 * 2048 * 2048)
    blocks = {"table": pages(2 * 50304 * 2048)}
    for layer in range(layers):
        blocks[f"attention{layer}"] = attention_bytes
        blocks |= {f"expert{layer}.{index}": expert_bytes for index in range(experts)}
    choose = random.Random(seed)
    popularity = [[1 / (1 + rank) ** 0.7 for rank in choose.sample(range(experts), experts)] for _ in range(layers)]
    last: dict[tuple[int, int], list[int]] = {}
    periods = []
    for _ in range(passes):
        one = [lease("table", seconds=0.0005)]
        for layer in range(layers):
            one.append(lease(f"attention{layer}", seconds=attention_bytes / MEMORY_RATE))
            wanted: dict[int, None] = {}
            for sequence in range(sequences):
                before = last.get((layer, sequence), [])
                chosen = [expert for expert in before if choose.random() < 0.35]
                while len(chosen) < active:
                    expert = choose.choices(range(experts), popularity[layer])[0]
                    if expert not in chosen:
                        chosen.append(expert)
                last[layer, sequence] = chosen
                wanted |= dict.fromkeys(sorted(chosen))
            one += [lease(f"expert{layer}.{index}", seconds=expert_bytes / MEMORY_RATE) for index in sorted(wanted)]
        periods.append(tuple(one))
    what = "OLMoE-1B-7B answers 2 requests: 16 layers of 64 experts, 8 for each token, drawn with skew and some memory of the last token"
    return Workload("experts", "mixture of experts", what, blocks, tuple(periods), passes // 2, repeats=False, frozen=frozenset(blocks))


SYNTHETIC: dict[str, Callable[[bool], Workload]] = {
    "full": lambda quick: full_finetune(_model(quick), steps=5 if quick else 18),
    "lora": lambda quick: lora(_model(quick), steps=5 if quick else 18),
    "inference": lambda quick: inference(_model(quick), passes=6 if quick else 40),
    "experts": lambda quick: experts(passes=6 if quick else 10, layers=4 if quick else 16, experts=16 if quick else 64),
    "evaluation": lambda quick: full_finetune(_model(quick), steps=5 if quick else 18, evaluations=2),
}
"""By name; the argument asks for a small version that is done in a moment."""


def _model(quick: bool) -> Transformer:
    return Transformer(layers=5) if quick else Transformer()
