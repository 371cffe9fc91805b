"""The model card of an exported judge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from arena.data.task import TokenTask
from arena.inference.saved import SavedJudge, auto_class

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SCORES = {
    "log_loss": "log-loss", "prior_log_loss": "log-loss of predicting the prior",
    "baseline_log_loss": "log-loss of a baseline, TF-IDF and lengths", "bayes_log_loss": "best possible log-loss",
    "accuracy": "accuracy", "ece": "calibration error", "perplexity": "perplexity",
}  # fmt: skip


def model_card(saved: SavedJudge, metrics: Mapping[str, Any], *, helper: bool) -> str:
    """A model card in Markdown.

    Args:
        metrics: those of the fold, as in `metrics.json`; empty if they are unknown.
        helper: whether `judge_prompt.py` stands beside it.
    """
    recipe, task = saved.recipe, saved.task
    tag = "text-generation" if isinstance(task, TokenTask) else "text-classification"
    base = [f"base_model: {recipe.model.base}"] if HUB_NAME.fullmatch(recipe.model.base) else []
    about = [
        "---", "library_name: transformers", f"pipeline_tag: {tag}",
        *base, "license: other", "license_name: that-of-the-base", "tags: [arena, judge]", "---", "",
        f"# {recipe.name}", "", _what(saved), "", "## Data and scores", "", *_scores(metrics),
    ]  # fmt: skip
    if not isinstance(task, TokenTask):
        about += ["", "## Use", "", *_use(saved, helper)]
    about += [
        "", "## Limits", "",
        f"- Prompts of more than {recipe.prompt.max_length:,} tokens were truncated in training.",
        "- What it predicts are the judgements of the people, or models, that labelled its training rows.",
        f"- The weights are those of {recipe.model.base} with what was trained added: the base's licence holds.",
    ]  # fmt: skip
    return "\n".join(about) + "\n"


def _what(saved: SavedJudge) -> str:
    recipe, task = saved.recipe, saved.task
    if isinstance(task, TokenTask):
        return f"{recipe.model.base}, tuned on the task `{task.name}`. Load it with `{auto_class(task)}`."
    classes = ", ".join(f"{at} {name}" for at, name in enumerate(task.classes))
    of = "both prompts of a pair, added up as below," if task.joins(recipe.prompt) else "a prompt"
    return (
        f"{recipe.model.base}, trained on the task `{task.name}`. The softmax of its logits at the last token of {of} "
        f"gives the probabilities of the classes {classes}. Load it with `{auto_class(task)}`."
    )


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return ["They are not known here: this judge was copied without the files of its training."]
    n_train, n_eval, steps = (
        f"{each:,}" if isinstance(each := metrics.get(key), int) else "an unknown number of"
        for key in ("n_train", "n_eval", "steps")
    )
    rows = f"{n_train} rows to train on, {n_eval} held out, {steps} steps."
    found = [(words, metrics[key]) for key, words in SCORES.items() if isinstance(metrics.get(key), float)]
    lines = [f"| {words} | {value:.4f} |" for words, value in found]
    return [rows, "", "| on the rows held out | |", "| --- | ---: |", *lines]


def _use(saved: SavedJudge, helper: bool) -> list[str]:
    if not helper:
        return ["`judge.json` has the prompt that it expects (`recipe.prompt`)."]
    pointwise = saved.task.joins(saved.recipe.prompt)
    shown, text = ("one answer", '"It is 4."') if pointwise else ("both answers", '"It is 4.", "It is five."')
    swap = (
        "A prompt shows one answer. Exchange the first two logits of B's prompt, add them to A's, and take the softmax."
        if pointwise
        else "Judge each pair a second time with A and B exchanged, exchange these probabilities back, and take the "
        "mean: it has no bias for the first answer."
    )
    return [
        f"`judge_prompt.py` writes the prompt, with {shown}, as token ids:", "", "```python",
        "import torch", "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "from judge_prompt import prompt_ids", "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForSequenceClassification.from_pretrained(".")',
        f'ids = prompt_ids(tokenizer, [("What is 2 + 2?", {text})])',
        "print(model(input_ids=torch.tensor([ids])).logits.softmax(-1), model.config.id2label)", "```", "", swap, "",
        "vLLM (`vllm serve .`, then `/classify`) and SGLang (`/v1/classify`) read the last token and "
        "give the softmax, in the order of `id2label`; send token ids, because the prompt's texts are tokenised one by "
        "one. Their score endpoints want one label and do not fit, and text-embeddings-inference has no such head for "
        "decoders. None of the three has been tried with this model.",
    ]  # fmt: skip
