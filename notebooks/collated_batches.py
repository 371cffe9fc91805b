# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Collated batches
#
# Judge prompts are laid end to end in one row, without padding, and what they have in common only once. This notebook
# shows the model's input: lengths, micro-batches, segments, position ids, what padding would waste, and which tokens
# attend to which.
#
# It runs on the demo data. For your own, change the recipe's `data.path` below, for example
# `arena.load_recipe("gemma-2-9b", ["data.path=data/lmsys"])`; only the tokenizer of the base model is loaded.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import arena
from arena.model.backbone import sliding_window
from arena.reporting.inspect import draw_attention

if Path.cwd().name == "notebooks":  # paths below are those of the project's folder
    os.chdir("..")
recipe = arena.load_recipe("demo")
dataloader = arena.open_fold(recipe, 0)  # the rows that training reads when fold 0 is held out
store, plan = dataloader.store, dataloader.plan
print(f"{len(store) // store.orders:,} rows, {store.orders} orders of A and B each; {plan.n_steps:,} steps of training")

# %% [markdown]
# ## Lengths
#
# The lengths of prompts differ by more than a factor of ten, which makes padding expensive.

# %%
lengths = store.lengths[:: store.orders]
print("tokens: " + ", ".join(f"{q}% {np.percentile(lengths, q):.0f}" for q in (0, 5, 50, 95, 100)))
print(f"cut to {recipe.prompt.max_length:,} tokens: {(store.tokens_cut > 0).mean():.1%} of the examples")
plt.figure(figsize=(8, 2.5))
plt.hist(lengths, bins=60)
plt.xlabel("tokens of an example")
plt.show()

# %% [markdown]
# ## The loop of a training step
#
# The loader yields, for each optimizer step, the list of its micro-batches. A micro-batch consists of segments: a
# beginning that examples share, once, and the rest of each example.

# %%
for batch in dataloader:
    for micro_batch in batch:
        print("input_ids   ", tuple(micro_batch["input_ids"].shape), micro_batch["input_ids"].dtype)
        print(
            "position_ids", tuple(micro_batch["position_ids"].shape), "largest", int(micro_batch["position_ids"].max())
        )
        print("cu_seqlens_q", micro_batch["cu_seqlens_q"][:6].tolist(), "...", int(micro_batch["cu_seqlens_q"][-1]))
        print("seq_lens    ", micro_batch["seq_lens"][:6], "... together", sum(micro_batch["seq_lens"]))
        print("segment     ", micro_batch["segment"][:6].tolist(), "... the segment that each example ends in")
        print("max_seq_len ", micro_batch["max_seq_len"], " batch_size", micro_batch["batch_size"])
        print("label       ", micro_batch["label"][0].tolist(), "... A, B, tie")
    break

# %% [markdown]
# The first example, decoded. It ends in the verdict suffix, and the head reads the state of its last token.

# %%
print(micro_batch["input_text"][0])

# %% [markdown]
# ## Boundaries and position ids
#
# `cu_seqlens_q` says where each segment begins. `position_ids` are positions in the example: a segment begins at 0, or
# if it continues a shared beginning, at the length of that beginning. With `packing.share=false` each segment is an
# example, all start at 0, and the batch also has `cu_seqlens`, as plain variable-length kernels take it.

# %%
starts = micro_batch["cu_seqlens_q"][:-1].long()
print("each segment begins at position", micro_batch["position_ids"][0, starts].tolist())
plt.figure(figsize=(8, 2.5))
plt.plot(micro_batch["position_ids"][0])
plt.xlabel("position in the row")
plt.ylabel("position id")
plt.show()

# %% [markdown]
# ## Fill, and what padding would waste


# %%
def padded(batch_size: int, grouped: bool) -> float:
    """Share of useful tokens when batches of `batch_size` are padded to their longest example."""
    order = np.sort(lengths) if grouped else lengths
    parts = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return lengths.sum() / sum(len(part) * part.max() for part in parts)


plain = arena.load_recipe("demo", ["packing.share=false"])
plans = {
    "training": plan,
    "training, nothing shared": arena.open_fold(plain).plan,
    "evaluation": arena.open_fold(recipe, held_out=True).plan,
    "evaluation, nothing shared": arena.open_fold(plain, held_out=True).plan,
}
for name, each in plans.items():
    print(
        f"{name}: {each.n_micro_batches:,} micro-batches, least possible {each.least_micro_batches:,}, fill rate "
        f"{each.fill_rate:.1%}, {each.unique_share:.1%} of the examples' tokens computed"
    )
print(f"useful when padded, 8 a batch: {padded(8, False):.1%} in given order, {padded(8, True):.1%} grouped by length")

# %%
plt.figure(figsize=(8, 2.5))
plt.bar(range(plan.n_micro_batches), plan.tokens, width=1.0)
plt.axhline(plan.budget, color="C3")
plt.xlabel("micro-batch")
plt.ylabel("tokens (line: budget)")
plt.show()

# %% [markdown]
# ## Which tokens attend to which
#
# A triangle for each segment's own tokens, and a block for what it shares with others: causal, and nothing across
# examples. In sliding-window layers only the dark band is seen. The mask is never built; the attention kernel reads the
# boundaries.

# %%
picture = draw_attention(micro_batch, sliding_window(recipe.model), Path("runs/attention.png"))
plt.figure(figsize=(6, 6))
plt.imshow(plt.imread(picture))
plt.axis("off")
plt.show()
