"""The prompt that the exported judge beside this file expects, as token ids. It needs transformers alone.

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSequenceClassification.from_pretrained(".")
ids = prompt_ids(tokenizer, [("What is 2 + 2?", "It is 4.", "I believe that it is five.")])
print(model(input_ids=torch.tensor([ids])).logits.softmax(-1), model.config.id2label)

A judge that reads answers one by one takes one answer in each turn; README.md says how two prompts make a prediction.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def prompt_ids(tokenizer: Any, turns: Sequence[Sequence[str | None]]) -> list[int]:
    """The token ids of a conversation.

    Args:
        turns: the user's prompt of each turn, and the answers that the prompt shows of it: A's and B's, or one; None
            where there is none.

    Raises:
        ValueError: the conversation is longer than those the judge was trained on, which were truncated; or a text
            holds a control token.
    """
    prompt = json.loads(Path(__file__).with_name("judge_prompt.json").read_text(encoding="utf-8"))
    ids: list[int] = list(prompt["begin"])
    for turn in turns:
        for heading, text in zip(prompt["headings"], turn, strict=True):
            own = prompt["missing"]
            if text is not None:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                own = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                if odd := set(own) & set(prompt["control"]):
                    raise ValueError(f"a text holds the control token {tokenizer.convert_ids_to_tokens(min(odd))!r}")
            ids += heading + own
        ids += prompt["separator"]
    ids += prompt["end"]
    if len(ids) > prompt["max_length"]:
        raise ValueError(f"the prompt has {len(ids):,} tokens, more than {prompt['max_length']:,}: shorten its texts")
    return ids
