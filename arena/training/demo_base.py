"""Makes the demo's base: a tiny Gemma-2 and its tokenizer, trained to notice what stands in a judge prompt.

The base reads conversations like the demo data's, seeds apart. At the end of each claim it learns which words a reader
might note there: the claim's mark, its negation, its tone, who speaks, how A and B stand so far; at the verdict suffix,
how they stand in the end. It is next-token prediction against the distribution of all such notes instead of one drawn
from it, which is far quicker. What people prefer (weights, ties, labels) is never shown: fine-tuning is to find that.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from arena.config import load_recipe
from arena.data import synthetic
from arena.data import synthetic_text as text
from arena.data.cells import whole_characters
from arena.data.prompt import PromptEncoder
from arena.files import written_whole
from arena.progress import progress

VOCABULARY, TOKENS_A_STEP, POOL = 2560, 3000, 256
PEAK_LR, WARMUP = 3e-3, 50  # warm-up in steps
BRIEF, EARLY = 0.35, 3  # share of the time in which brief rows go out of use; layers after which facts must be known
WEIGHTS, TEXT_SHARE = (1.0, 1.0, 2.0, 0.1), 0.1  # of the losses, as `batch_losses` gives them; share of text learned
FACTS_SHARE = 0.4  # of what is noted after a claim

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
UNUSED = ("<unused0>", "<unused1>")
PIECES = r"▁?\p{L}+|\p{N}|▁?[^▁\p{L}\p{N}\s]+|▁+|\s+"  # words with their space, digits one by one, signs, white space

# What may be noted after a claim: its mark, whether it is negated, its tone (their XOR), who speaks.
FACTS = (" Praise", " Blame", " Stated", " Denied", " Hooray", " Alas", " A", " B")
# How the two sides stand, each on a scale of words from -1 to 1; and how large a share of the notes speaks of it.
SCALES = (
    (0.26, "dismal poor glum gloomy dim level bright sunny cheerful rich superb"),  # tone of A against B
    (0.16, "sour bitter stern plain mild kind sweet"),  # tone of A
    (0.16, "black grey brown white pink orange golden"),  # tone of B
    (0.24, "tiny brief short slim even wide long ample huge"),  # length of A against B
    (0.18, "open both shut"),  # refusals of A against B
)
WORDS = (*FACTS, *(f" {word}" for _, scale in SCALES for word in scale.split()))


class Lesson(NamedTuple):
    """A judge prompt, the places where something is noted (ends of claims, then of the suffix), and what may be."""

    ids: np.ndarray  # int64, shape (n_tokens,)
    places: list[int]
    notes: np.ndarray  # float32, shape (len(places), len(WORDS)): in each row a distribution


class Reader:
    """Finds the claims in a judge prompt's tokens and says what may be noted at the end of each."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        self.words = [self._ids(word)[0] for word in WORDS]
        good, bad, negators = ([self._ids(f" {w}")[0] for w in words] for words in (text.GOOD, text.BAD, text.NEGATORS))
        self.marks, self.negators = dict.fromkeys(good, 1) | dict.fromkeys(bad, -1), set(negators)
        self.stop = self._ids(".")[0]
        self.refusal = self._ids(text.REFUSAL)
        if len({*self.words, *self.marks, *self.negators}) < len(WORDS) + len(self.marks) + len(self.negators):
            raise ValueError("the tokenizer splits some of the words that this module counts on; enlarge VOCABULARY")

    def _ids(self, words: str) -> list[int]:
        return list(self.encoder.tokenizer(words, add_special_tokens=False)["input_ids"])

    def lessons(self, rows: Sequence[synthetic.Row]) -> list[Lesson]:
        """One lesson for each conversation."""
        columns = {name: [_padded(getattr(row, name), len(row.prompt)) for row in rows] for name in rows[0]._fields}
        return [self._lesson(example.input_ids.tolist()) for example in self.encoder.encode(columns, both_orders=False)]

    def _lesson(self, ids: list[int]) -> Lesson:
        tones: tuple[list[int], list[int]] = ([], [])
        tokens, refused = [0, 0], [0, 0]
        places: list[int] = []
        notes: list[list[float]] = []
        who, sign, negated = -1, 0, False  # who: 0 for A, 1 for B, -1 for the user
        headings = list(enumerate(self.encoder.headings, start=-1))
        for place, token in enumerate(ids[: len(ids) - len(self.encoder.suffix)]):
            who = next((speaker for speaker, heading in headings if _ends(ids, place, heading)), who)
            if who < 0:
                continue
            tokens[who] += 1
            refused[who] |= _ends(ids, place, self.refusal)
            negated |= token in self.negators and not sign
            sign = self.marks.get(token, sign)
            if token == self.stop:
                if sign:
                    tones[who].append(-sign if negated else sign)
                    places.append(place)
                    notes.append(_facts(sign, negated, who) + _standing(tones, tokens, refused))
                sign, negated = 0, False
        notes.append([0.0] * len(FACTS) + _standing(tones, tokens, refused))
        shares = np.array(notes, dtype=np.float32)
        shares[:-1] *= [FACTS_SHARE] * len(FACTS) + [1 - FACTS_SHARE] * (len(WORDS) - len(FACTS))
        return Lesson(np.array(ids, dtype=np.int64), [*places, len(ids) - 1], shares)


def _padded(turns: Sequence[str | None], count: int) -> list[str | None]:
    return [turn and whole_characters(turn) for turn in turns] + [None] * (count - len(turns))


def _ends(ids: list[int], place: int, phrase: list[int]) -> bool:
    return ids[place] == phrase[-1] and ids[max(place + 1 - len(phrase), 0) : place + 1] == phrase


def _facts(sign: int, negated: bool, who: int) -> list[float]:
    """The distribution over `FACTS` after a claim; tone counts twice."""
    mark, denied, speaker = 0.2 * (sign > 0), 0.2 * negated, 0.2 * (who == 0)
    tone = 0.4 * ((sign > 0) != negated)
    return [mark, 0.2 - mark, 0.2 - denied, denied, tone, 0.4 - tone, speaker, 0.2 - speaker]


def _standing(tones: Sequence[list[int]], tokens: Sequence[int], refused: Sequence[int]) -> list[float]:
    """The distribution over the words of `SCALES`, from what A and B have said so far."""
    a, b = (sum(side) / max(len(side), 1) for side in tones)
    length = (tokens[0] - tokens[1]) / max(sum(tokens), 1)
    values = ((a - b) / 2, a, b, length, refused[0] - refused[1])
    scales = zip(SCALES, values, strict=True)
    return [share * p for (share, words), value in scales for p in _graded(len(words.split()), value)]


def _graded(levels: int, value: float) -> list[float]:
    """Probabilities of a scale's words for a value in [-1, 1]: a bell, about one word wide, around its place."""
    place = (value + 1) / 2 * (levels - 1)
    bell = [math.exp(-((level - place) ** 2) / (2 * 0.7**2)) for level in range(levels)]
    return [each / sum(bell) for each in bell]


def brief_row(rng: Random) -> synthetic.Row:
    """A short conversation of claims only: the densest text about tone, read first."""
    a, b = (" ".join(text.claim(rng, rng.choice((1, -1))) for _ in range(rng.randint(1, 4))) for _ in "ab")
    return synthetic.Row([text.question(rng, rng.choice(list(text.TOPICS)))], [a], [b])


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


def make_demo_base(folder: Path, seconds: float, seed: int, threads: int) -> None:
    """Trains tokenizer and base, the base for `seconds` on `threads` threads, and writes both whole into `folder`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = Random(f"demo base {seed}")  # demo data have plain numbers for seeds, so never the same stream
    tokenizer = make_tokenizer(rng)
    reader = Reader(PromptEncoder(tokenizer, load_recipe("demo").prompt))
    model = make_model(len(tokenizer))
    pretrain(model, reader, rng, seconds)
    with written_whole(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "generation_config.json").unlink(missing_ok=True)
        for readme in folder.glob("*.md"):
            shutil.copy(readme, draft)


def make_model(vocabulary: int) -> Gemma2ForCausalLM:
    """A Gemma-2 of about 0.9 M parameters: four layers, every other one with a sliding window."""
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=2048,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, tie_word_embeddings=True,
        initializer_range=128**-0.5, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "demo_pretraining"
    return Gemma2ForCausalLM(config)


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    scaling: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Fused causal attention without the softcap, which these small logits do not reach; padding on the right."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = None
    if sliding_window and sliding_window < length:
        age = torch.arange(length)[:, None] - torch.arange(length)
        mask = (age >= 0) & (age < sliding_window)
    attend = functional.scaled_dot_product_attention
    return attend(query, key, value, mask, is_causal=mask is None, scale=scaling).transpose(1, 2), None


AttentionInterface.register("demo_pretraining", _attend)


def pretrain(model: Gemma2ForCausalLM, reader: Reader, rng: Random, seconds: float) -> None:
    """Trains all layers for `seconds`; the share of brief rows falls to a tenth, the learning rate to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))
    seen: list[list[float]] = []
    with progress("demo base", None, "steps") as advance:
        for step, (share, batch) in enumerate(_batches(reader, rng, seconds)):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP, max(1.0 - share, 0.01) / 0.6)
            losses = batch_losses(model, reader, batch)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen = [*seen[-49:], [loss.item() for loss in losses]]
            note, early, suffix, plain = np.mean(seen, axis=0)
            advance(1, f"excess loss: notes {note:.3f}, early {early:.3f}, verdict {suffix:.3f}, text {plain:.3f}")


def _batches(reader: Reader, rng: Random, seconds: float) -> Iterator[tuple[float, list[Lesson]]]:
    """For `seconds`, the share of the time gone by and a batch of lessons of like length, `TOKENS_A_STEP` at most."""
    start, share = time.monotonic(), 0.0
    while share < 1:
        brief = max(0.1, 1 - share / BRIEF)
        rows = [brief_row(rng) if rng.random() < brief else synthetic.make_row(rng) for _ in range(POOL)]
        batches: list[list[Lesson]] = [[]]
        for lesson in sorted(reader.lessons(rows), key=lambda lesson: len(lesson.ids)):
            if batches[-1] and len(lesson.ids) * (len(batches[-1]) + 1) > TOKENS_A_STEP:
                batches.append([])
            batches[-1].append(lesson)
        rng.shuffle(batches)
        for batch in batches:
            share = (time.monotonic() - start) / seconds
            if share < 1:
                yield share, batch


def batch_losses(model: Gemma2ForCausalLM, reader: Reader, batch: Sequence[Lesson]) -> list[torch.Tensor]:
    """Losses of the notes, of their facts already at an early layer, of the note at the suffix, and of plain text."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(lesson.ids) for lesson in batch], batch_first=True)
    out = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    last, early = out.last_hidden_state, model.model.norm(out.hidden_states[EARLY])
    rows = torch.tensor([row for row, lesson in enumerate(batch) for _ in lesson.places])
    places = torch.tensor([place for lesson in batch for place in lesson.places])
    notes = torch.from_numpy(np.concatenate([lesson.notes for lesson in batch]))
    facts = notes[:, : len(FACTS)] / FACTS_SHARE
    claims = facts.sum(-1) > 0
    count = max(int(claims.sum()), 1)
    words = torch.tensor(reader.words)
    note = _excess(_logits(model, last[rows, places]), words, notes)
    fact = _excess(_logits(model, early[rows, places][claims]), words[: len(FACTS)], facts[claims])
    plain = (torch.rand(ids.shape) < TEXT_SHARE) & (ids > 0)
    plain[:, -1] = plain[rows, places] = False
    following = ids.roll(-1, 1)[plain]
    spoken = functional.cross_entropy(_logits(model, last[plain]), following)
    losses = note[claims].sum() / count, fact.sum() / count, note[~claims].mean(), spoken
    return [weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True)]


def _logits(model: Gemma2ForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.lm_head(hidden)
    return torch.tanh(logits / 30.0) * 30.0


def _excess(logits: torch.Tensor, words: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy less its least possible value, per row; `target` is a distribution over `words`."""
    surprise: torch.Tensor = torch.special.xlogy(target, target) - target * logits.log_softmax(-1)[:, words]
    return surprise.sum(-1)
