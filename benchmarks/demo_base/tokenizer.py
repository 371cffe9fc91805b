"""The demo base's tokenizer: byte-pair with byte fallback, in the style of Gemma's."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from arena.config import load_recipe
from arena.data.cells import whole_characters
from arena.demo import synthetic
from benchmarks.demo_base.lessons import WORDS

VOCABULARY = 2560
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
UNUSED = ("<unused0>", "<unused1>")
PIECES = r"▁?\p{L}+|\p{N}|▁?[^▁\p{L}\p{N}\s]+|▁+|\s+"  # words with their space, digits one by one, signs, white space


def make_tokenizer(rng: Random) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer in the style of Gemma's, trained on demo conversations and on ordinary English."""
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Replace(" ", "▁")
    model.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [*SPECIAL, *UNUSED, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, limit_alphabet=400, show_progress=False, special_tokens=control
    )
    model.train_from_iterator(_corpus(rng), trainer)
    tree = json.loads(model.to_str())
    tree["added_tokens"] = []  # byte tokens only serve the byte fallback: their names are no control text
    model = Tokenizer.from_str(json.dumps(tree))
    model.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    model.add_tokens([AddedToken(token, normalized=False, special=False) for token in UNUSED])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=8192, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _corpus(rng: Random) -> Iterator[str]:
    """Conversations, the words of notes and prompts, and the docstrings of Python's standard library."""
    template = load_recipe("demo").prompt.template
    for _ in range(4000):
        for part in synthetic.make_row(rng):
            yield from (whole_characters(turn) for turn in part if turn)
        yield "".join([*WORDS, *template.model_dump().values()])
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
