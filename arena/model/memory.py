"""What a judge takes on a card, by arithmetic, and which layers keep how much of a forward pass.

With H the hidden size, I that of the MLP, Q and K all query and all key heads, a layer keeps for each token, in the
compute dtype: its input and the input of the MLP's norm (2 H); the last products of attention and MLP if norms follow
them (2 H); queries, keys, values and attention's result (2 Q + 2 K); the MLP's wide products (2 I); and with policy
`none` the norms' results (2 H) and the activation's (I). `mlp` does without 2 I; `full` keeps its input alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arena.config import ModelSettings, Recipe
from arena.model.card import Card

GIB = 2**30
RESERVED = 0.9 * GIB  # the driver's context, the workspace of matrix products
USABLE = 0.94  # of the rest: memory falls to pieces
LEAST_BUDGET = 1024
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 64 share a scale of 8 bits, 256 of these one of 32 bits
LADDER = ("full", "mlp", "light", "none")  # each keeps more than the one before and computes less again


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `closing_norms`: whether norms follow attention and MLP too, as in Gemma-2."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    closing_norms: bool

    @property
    def attention_weights(self) -> int:
        """Of one layer's four products."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Of one layer's three products."""
        return 3 * self.hidden * self.intermediate

    @property
    def linear_weights(self) -> int:
        """Of all layers' products: the N of the 2 N operations that a token's forward takes."""
        return self.layers * (self.attention_weights + self.mlp_weights)

    def lora_weights(self, r: int) -> int:
        """Of adapters of rank r on all products."""
        attention = 4 * self.hidden + 2 * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * r * (attention + 3 * (self.hidden + self.intermediate))

    def kept(self, policy: str) -> int:
        """Numbers that a layer keeps for each token under a policy."""
        if policy == "full":
            return self.hidden
        streams = self.hidden * (4 if self.closing_norms else 2)
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        wide = {"mlp": 0, "light": 2 * self.intermediate, "none": 3 * self.intermediate + 2 * self.hidden}[policy]
        return streams + attention + wide

    def again(self, policy: str) -> float:
        """The share of a layer's forward that the backward computes again, by operations.

        Passes over memory have no operations to speak of; they are counted as a twentieth (of a fused forward's time,
        at the bandwidth and matrix rate of current cards, about that is theirs).
        """
        wide = 2 / 3 * self.mlp_weights / (self.attention_weights + self.mlp_weights)
        return {"full": 1.0, "mlp": 0.05 + 0.95 * wide, "light": 0.05, "none": 0.0}[policy]


def shape_of(config: Any) -> Shape:
    """The sizes in a decoder's transformers config."""
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        closing_norms=config.model_type == "gemma2",
    )


@dataclass(frozen=True)
class Need:
    """Bytes of one training step with full recomputation, by what they are for."""

    weights: float
    trained: float  # weights that train, their gradients, the optimizer's moments
    kept: float  # every layer's input
    working: float  # one layer's forward and backward

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.kept + self.working


def need(shape: Shape, settings: ModelSettings, tokens: int, optimizer: str = "adamw") -> Need:
    """What training takes with full recomputation and micro-batches of `tokens`."""
    width = WIDTH["bfloat16" if settings.dtype == "auto" else settings.dtype]
    embeddings = shape.vocabulary * shape.hidden
    state = 4 + 4 + (2 if optimizer == "adamw8bit" else 8)
    if settings.tune == "full":  # float32 weights and streams; autocast holds the products' weights once more
        weights, trained = float(width * shape.linear_weights), float(state * (shape.linear_weights + embeddings))
    else:
        bytes_of = {"nf4": NF4, "int8": 1.0, "none": float(width)}[settings.quantization]
        weights = bytes_of * shape.linear_weights + width * embeddings
        trained = float(state * shape.lora_weights(settings.lora.r)) if settings.tune == "lora" else 0.0
    # at the most a layer's everything, gradients of its wide tensors and streams, and one dequantised weight or two
    per_token = shape.kept("none") + 4 * shape.intermediate + 4 * shape.hidden
    dequantised = 2 * width * shape.hidden * shape.intermediate
    stream = 4 if settings.tune == "full" else width
    kept = 0 if settings.tune == "head" else stream * shape.layers * shape.kept("full") * tokens
    return Need(weights, trained, kept, width * per_token * tokens + dequantised)


def room(card: Card) -> float:
    """Bytes of a card that a run may plan with."""
    return (card.memory - RESERVED) * USABLE


def fit(recipe: Recipe, config: Any, card: Card) -> Recipe:
    """The recipe as it runs on a card: the budget halved until a micro-batch fits.

    A CPU's memory is not looked at. Rows and checkpoints are made for the budget, so it never changes within a run.

    Raises:
        ValueError: even the least budget does not fit; says what would.
    """
    settings = recipe.model
    if card.kind == "cpu":
        return recipe
    shape, budget = shape_of(config), recipe.packing.budget
    least = max(recipe.prompt.max_length, LEAST_BUDGET)
    while (found := need(shape, settings, budget, recipe.train.optimizer)).total > room(card):
        if budget // 2 < least:
            smaller = "" if settings.quantization == "nf4" else ", or set model.tune=lora model.quantization=nf4"
            raise ValueError(
                f"{recipe.name} takes about {found.total / GIB:.1f} GiB with micro-batches of {budget:,} tokens, and "
                f"{card.name} has room for {room(card) / GIB:.1f}: lower prompt.max_length (now "
                f"{recipe.prompt.max_length:,}) or take a smaller base{smaller}"
            )
        budget //= 2
    return recipe.model_copy(update={"packing": recipe.packing.model_copy(update={"budget": budget})})


def mix(kept: Mapping[str, float], again: Mapping[str, float], layers: int, free: float) -> list[str]:
    """A policy for each of some layers that keep alike: as little computed again as `free` bytes allow.

    Starts with `full` everywhere and, step by step, takes the change of one layer that saves most for its bytes.

    Args:
        kept: bytes that a layer keeps under each policy; a policy that is not named is not used.
        again: what it computes again, in any unit.
        free: bytes beside those of `full` everywhere.
    """
    policies = ["full"] * layers
    while True:
        steps = []
        for at, policy in enumerate(policies):
            for other in kept:
                extra, saved = kept[other] - kept[policy], again[policy] - again[other]
                if saved > 0 and extra <= free:
                    steps.append((saved / max(extra, 1.0), -at, other, extra))
        if not steps:
            return policies
        _, at, other, extra = max(steps)
        policies[-at] = other
        free -= extra


def describe(policies: list[str]) -> str:
    """Such as `36 layers light, 6 mlp`."""
    counts = {policy: policies.count(policy) for policy in reversed(LADDER) if policy in policies}
    return ", ".join(f"{count} {policy}" for policy, count in counts.items())
