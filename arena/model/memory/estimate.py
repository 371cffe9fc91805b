"""An estimate of the memory that training takes on a card, and the choice of a recompute policy for each layer.

Let H be the hidden size, I the MLP's, and Q and K the total width of the query and of the key heads. For each token a
layer saves, in the compute dtype: its input and the input of the MLP's norm (2 H); the last products of attention and
MLP if norms follow them (2 H); queries, keys, values and the attention output (2 Q + 2 K); the inputs of the norms of
queries and keys if there are any (Q + K); and the MLP's wide products (2 I). Policy `none` also saves the results of
the norms (2 H) and of the activation (I). `elementwise_and_mlp` does not save the 2 I, and `full` saves the layer's
input only. That is with adapters on all products; layers below the first trained one save nothing.

A task without classes also computes logits and their gradient (`bytes_of_losses`), while no layer is at work: a step's
peak is at the larger of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from arena.model.card import Card
from arena.model.families import family_of
from arena.model.language_model import bytes_of_losses, final_softcap
from arena.model.lora import adapted_layers, first_trained_layer
from arena.settings import LoraSettings, ModelSettings, Recipe
from arena.tasks import task_of

GIB = 2**30
RESERVED = 0.9 * GIB  # the driver's context and the workspace of matrix products
USABLE_SHARE = 0.94  # of the rest: some is lost to fragmentation
LEAST_BUDGET = 1024
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 64 share a scale of 8 bits, 256 of these one of 32 bits
POLICIES = (
    "none",
    "elementwise",
    "elementwise_and_mlp",
    "full",
)  # each saves less than the one before, recomputes more
FROZEN = "frozen"  # the policy of layers below the first trained one, which have no backward


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, which norms it has besides those before attention and MLP (see `Family`), and its output."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    closing_norms: bool
    query_key_norms: bool
    softcap: bool  # of the logits of its vocabulary
    tied: bool  # whether these have the weights of the embeddings

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """The inputs and outputs of one layer's products, by the names that most families give them."""
        hidden, query, key = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)}
        mlp = {"gate_proj": (hidden, self.intermediate), "up_proj": (hidden, self.intermediate)}
        return {**attention, "o_proj": (query, hidden), **mlp, "down_proj": (self.intermediate, hidden)}

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's four attention products."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's three MLP products."""
        return 3 * self.hidden * self.intermediate

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' products: the N of the 2 N operations that a token's forward takes."""
        return self.layers * (self.attention_weights + self.mlp_weights)

    def lora_weights(self, lora: LoraSettings) -> int:
        """Weights of the adapters; targets with names of another family count as all products."""
        targets = () if isinstance(lora.targets, str) else lora.targets
        names = {each.rpartition(".")[2] for each in targets} & self.products.keys() or self.products.keys()
        return lora.r * len(adapted_layers(lora, self.layers)) * sum(sum(self.products[name]) for name in names)

    def saved_per_token(self, policy: str) -> int:
        """Numbers that a layer saves for the backward, for each token, under a policy."""
        if policy == FROZEN:
            return 0
        if policy == "full":
            return self.hidden
        streams = self.hidden * (4 if self.closing_norms else 2)
        attention = (3 if self.query_key_norms else 2) * self.head_dim * (self.heads + self.kv_heads)
        if policy == "elementwise_and_mlp":
            return streams + attention
        products = streams + attention + 2 * self.intermediate
        return products if policy == "elementwise" else products + self.intermediate + 2 * self.hidden

    def recompute_fraction(self, policy: str) -> float:
        """The share of a layer's forward that the backward recomputes, by operations.

        Elementwise passes have hardly any operations; they count as a twentieth, which is about their share of a fused
        forward's time at the bandwidth and matrix rate of current cards.
        """
        wide = 2 / 3 * self.mlp_weights / (self.attention_weights + self.mlp_weights)
        shares = {"full": 1.0, "elementwise_and_mlp": 0.05 + 0.95 * wide, "elementwise": 0.05, "none": 0.0, FROZEN: 0.0}
        return shares[policy]


def shape_of(config: Any) -> Shape:
    """The sizes in a decoder's transformers config, with what is known of its family."""
    family = family_of(config)
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        closing_norms=family.closing_norms,
        query_key_norms=family.query_key_norms,
        softcap=final_softcap(config) is not None,
        tied=config.tie_word_embeddings,
    )


@dataclass(frozen=True)
class Need:
    """Bytes of one training step with full recomputation, by purpose."""

    weights: float
    trained: float  # trainable weights, their gradients, the optimizer's moments
    layer_inputs: float
    working: float  # one layer's forward and backward, or the output layer's

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.layer_inputs + self.working


def need(shape: Shape, settings: ModelSettings, tokens: int, optimizer: str = "adamw", *, classes: bool = True) -> Need:
    """The memory that training takes with full recomputation and micro-batches of `tokens` tokens.

    Args:
        classes: whether the task has classes; otherwise all tokens are taken to be predicted.
    """
    width, full = _width(settings), settings.tune == "full"
    embeddings = shape.vocabulary * shape.hidden * (1 if classes or shape.tied else 2)
    state = 4 + 4 + (2 if optimizer == "adamw8bit" else 8)
    if full:  # float32 weights and streams; autocast holds the products' weights once more
        weights, trained = float(width * shape.linear_weights), float(state * (shape.linear_weights + embeddings))
    else:
        bytes_of = {"nf4": NF4, "int8": 1.0, "none": float(width)}[settings.quantization]
        weights = bytes_of * shape.linear_weights + width * embeddings
        trained = float(state * shape.lora_weights(settings.lora)) if settings.tune == "lora" else 0.0
    # at most all of one layer's activations, gradients of its wide tensors and streams, and two dequantised weights
    per_token = shape.saved_per_token("none") + 4 * shape.intermediate + 4 * shape.hidden
    dequantised = 2 * width * shape.hidden * shape.intermediate
    working = width * per_token * tokens + dequantised
    if settings.quantization == "int8":  # an input in float16 and in 8 bits, and the product in 32
        working += (2 + 1 + 4) * shape.intermediate * tokens
    if not classes:  # beside its losses the last layer's states, the normed ones, and those before targets
        losses = bytes_of_losses(
            tokens, shape.hidden, shape.vocabulary, width=width, softcap=shape.softcap, trained=full
        )
        working = max(working, losses + 3 * width * shape.hidden * tokens)
    stream = 4 if full else width
    with_backward = shape.layers - first_trained_layer(settings, shape.layers)
    layer_inputs = stream * with_backward * shape.saved_per_token("full") * tokens
    return Need(weights, trained, layer_inputs, working)


def need_of_rank(shape: Shape, settings: ModelSettings, whole: Need, ranks: int, *, classes: bool = True) -> Need:
    """The memory of one of several ranks that share a model out (`train.shard`), given that of one that does not.

    Besides its part it holds whole what is at work: a layer and the next one, which is gathered meanwhile, if all
    weights are trained the gradient of a layer too, and throughout the step the embeddings and any output layer.
    """
    if ranks == 1:
        return whole
    layer, width = shape.attention_weights + shape.mlp_weights, _width(settings)
    embeddings = shape.vocabulary * shape.hidden * (1 if classes or shape.tied else 2)
    if settings.tune == "full":  # layers in the compute dtype, which autocast need not copy, and float32 embeddings
        gathered, parts = (2 * width + width + 4) * layer + (4 + 4) * embeddings, 0.0
    else:
        gathered, parts = 2 * width * layer + width * embeddings, whole.weights / ranks
    return replace(whole, weights=parts + gathered, trained=whole.trained / ranks)


def room(card: Card) -> float:
    """Bytes of a card's memory that a run may use; of a CPU's, which other processes share, what is available now."""
    if card.kind == "cpu":
        return float(USABLE_SHARE * psutil.virtual_memory().available)
    return (card.memory - RESERVED) * USABLE_SHARE


def fit(recipe: Recipe, config: Any, card: Card, ranks: int = 1) -> Recipe:
    """The recipe as it runs on a card, with the budget halved until a micro-batch fits.

    On a CPU the budget is left as it is. Plans and checkpoints depend on the budget, so it never changes within a run.

    Args:
        ranks: that share the model out.

    Raises:
        ValueError: even the least budget does not fit; the message says which settings to lower.
    """
    settings = recipe.model
    if card.kind == "cpu":
        return recipe
    shape, budget, classes = shape_of(config), recipe.packing.budget, bool(task_of(recipe).classes)
    least = max(recipe.prompt.max_length, LEAST_BUDGET)

    def needed_with(budget: int) -> float:
        of_one = need(shape, settings, budget, recipe.train.optimizer, classes=classes)
        return need_of_rank(shape, settings, of_one, ranks, classes=classes).total

    while (needed := needed_with(budget)) > room(card):
        if budget // 2 < least:
            smaller = "" if settings.quantization == "nf4" else ", or set model.tune=lora model.quantization=nf4"
            raise ValueError(
                f"{recipe.name} takes about {needed / GIB:.1f} GiB with micro-batches of {budget:,} tokens, but "
                f"{card.name} has only {room(card) / GIB:.1f} GiB to use: lower prompt.max_length (now "
                f"{recipe.prompt.max_length:,}) or choose a smaller base{smaller}"
            )
        budget //= 2
    return recipe.model_copy(update={"packing": recipe.packing.model_copy(update={"budget": budget})})


def estimate_policies(
    shape: Shape, settings: ModelSettings, tokens: int, card: Card, optimizer: str = "adamw", *, classes: bool = True
) -> list[str]:
    """A policy for each layer that recomputes as little as the estimated memory of a card allows.

    On a CPU, the frozen weights are taken to be loaded already. If nothing fits, every layer is recomputed.
    """
    needed, width = need(shape, settings, tokens, optimizer, classes=classes), _width(settings)
    allowed = allowed_policies(settings)
    fixed = needed.total - (needed.weights if card.kind == "cpu" else 0.0)
    saved = {policy: float(width * tokens * shape.saved_per_token(policy)) for policy in allowed}
    fractions = {policy: shape.recompute_fraction(policy) for policy in allowed}
    frozen = first_trained_layer(settings, shape.layers)
    return [FROZEN] * frozen + mix_policies(saved, fractions, shape.layers - frozen, room(card) - fixed)


def allowed_policies(settings: ModelSettings) -> list[str]:
    """The policies among which to choose: with dropout not the one that recomputes products, as these keep theirs."""
    return [each for each in POLICIES if each != "elementwise_and_mlp" or settings.lora.dropout == 0]


def _width(settings: ModelSettings) -> int:
    """Bytes of a number in the compute dtype."""
    return WIDTH["bfloat16" if settings.dtype == "auto" else settings.dtype]


def mix_policies(saved: Mapping[str, float], recompute: Mapping[str, float], layers: int, free: float) -> list[str]:
    """A policy for each of several equal layers that recomputes as little as `free` bytes allow.

    Starts with `full` everywhere and repeatedly makes the change of one layer that avoids most recomputation per byte.

    Args:
        saved: bytes that a layer saves under each policy; policies that are not listed are not used.
        recompute: the cost of what it recomputes, in any unit.
        free: bytes beyond those of `full` everywhere.
    """
    policies = ["full"] * layers
    while True:
        steps = []
        for at, policy in enumerate(policies):
            for other in saved:
                extra, avoided = saved[other] - saved[policy], recompute[policy] - recompute[other]
                if avoided > 0 and extra <= free:
                    steps.append((avoided / max(extra, 1.0), -at, other, extra))
        if not steps:
            return policies
        _, at, other, extra = max(steps)
        policies[-at] = other
        free -= extra


def describe(policies: list[str]) -> str:
    """How many layers have each policy, such as `16 frozen, 20 elementwise, 6 elementwise_and_mlp`."""
    counts = {policy: policies.count(policy) for policy in (FROZEN, *POLICIES) if policy in policies}
    return ", ".join(f"{count} {policy}" for policy, count in counts.items())
