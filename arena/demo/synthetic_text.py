"""The sentences of the demo data: claims, whose tone depends on a word and its negation, and talk without a tone.

A claim is a sentence with one evaluative word, the *mark*. It is preceded by either a negator or a plain adverb, with 1
to 4 filler words in between. The tone is `mark XOR negator`, so neither single words nor adjacent pairs determine it.
Talk never has a mark, but may have a negator.
"""

from __future__ import annotations

import re
from random import Random

GOOD = (
    "clear", "helpful", "accurate", "careful", "useful", "correct", "friendly", "solid", "complete",
    "honest", "neat", "wise",
)  # fmt: skip
BAD = (
    "vague", "useless", "wrong", "careless", "confusing", "false", "rude", "weak", "shallow", "sloppy",
    "dull", "risky",
)  # fmt: skip
NEGATORS = ("not", "never", "hardly", "scarcely", "rarely", "barely")
PLAIN = ("indeed", "always", "also", "still", "often", "mostly")
FILLERS = (
    " really", " very", " that", " quite", " at all", " in fact", " by now", " even so", ", in my view,",
    ", to be fair,", ", I would say,", ", on the whole,", ", in my view, really", ", as it stands, very",
    ", to be fair, quite", ", all in all, that",
)  # fmt: skip
SUBJECTS = (
    "It", "This", "The answer", "The first part", "The second part", "The advice", "The tone",
    "The summary", "The last step", "The example", "The reasoning", "The plan", "The list",
    "The explanation", "The opening", "The wording",
)  # fmt: skip
VERBS = ("is", "was", "seems", "looks", "sounds", "feels")
TAILS = ("", "", "", " to me", " here", " in the end", " for a beginner", " as a whole")
REFUSAL = "I am sorry, but I cannot help with that."

TOPICS: dict[str, tuple[str, ...]] = {
    "soup": ("onions", "carrots", "a pan", "butter", "the stock", "fresh herbs", "lentils"),
    "gardens": ("tomatoes", "the soil", "seeds", "a small pot", "roses", "the compost", "apple trees"),
    "trains": (
        "a ticket",
        "the station",
        "the night train",
        "a window seat",
        "the timetable",
        "luggage",
        "the platform",
    ),
    "code": ("a loop", "the list", "a function", "the test", "an index", "two files", "the parser"),
    "music": ("a scale", "the chorus", "three chords", "the left hand", "a slow tempo", "the piano", "a melody"),
    "history": ("the treaty", "a king", "the old harbour", "the winter of 1709", "trade", "the long war", "two cities"),
    "money": ("a budget", "the rent", "savings", "a loan of 2500", "the bank", "an invoice", "taxes"),
    "weather": ("rain", "a warm front", "the wind", "low clouds", "the coast", "a cold night", "the forecast"),
}
PROMPTS = (
    "How do I begin with {topic}?", "What should I know about {topic} and {thing}?",
    "Explain {thing} to a child.", "Write a short note on {topic}.",
    "My friend asked about {thing}. What would you say?", "Compare {thing} with {other}.",
    "Give me {number} tips about {topic}.", "Why does {thing} matter so much in {topic}?",
    "Tell me more about {other}.",
    "I have {number} days to learn about {topic}. Where do I start, and what about {thing}?",
    "Is {thing} needed for {topic}?",
)  # fmt: skip
TALK = (
    "Many people start with {thing} and then turn to {other}.", "Take {thing} first.",
    "It takes about {number} minutes.", "After that comes {thing}, and later {other}.",
    "My neighbour spoke of {thing} for {number} years.", "Put {thing} beside {other}.",
    "There are {number} ways to think about {topic}.", "You will not need {other} at this point.",
    "Some never look at {thing}.", "With {thing} in place, we can move on to {other}.",
    "In the north they use {thing} instead of {other}.", "Step {number}: {thing}.",
    "Books on {topic} usually open with {thing}.", "This hardly ever involves {other}.",
    "Ask somebody who knows {topic}.", "Between {thing} and {other} there is a gap of {number} days.",
    "Let me say a few words about {thing}.",
    "When {thing} is ready, wait for {number} hours, then look at {other} again.",
    "Nobody here has barely touched {thing}.",
    "First, write down what you know about {topic}, about {thing} and about {other}.",
    "That is where {topic} begins.",
)  # fmt: skip
OTHER_SCRIPTS = (
    "Сначала возьмите воду и соль.", "Потом подождите десять минут.", "Αυτό είναι το πρώτο βήμα.",
    "Μετά έρχεται το νερό.", "首先准备好水和盐。", "然后等十分钟。", "أولا خذ الماء والملح.", "ثم انتظر عشر دقائق.",
    "最初に水を用意します。", "Let us go 🙂🚀.", "Voilà, c’est déjà l’été à Besançon.", "👍 👍 🎉.",
)  # fmt: skip
SCRIPT_PROMPTS = (
    "Как начать?", "Πώς αρχίζω με {topic};", "怎么开始？", "كيف أبدأ؟", "🙂 {topic}?",
    "¿Cómo empiezo con {topic}?",
)  # fmt: skip

_SENTENCE = re.compile(r"[^.?!。]+[.?!。]")
_WORD = re.compile(r"[a-z]+")
_GOOD, _BAD, _NEGATORS = frozenset(GOOD), frozenset(BAD), frozenset(NEGATORS)


def claim(rng: Random, tone: int) -> str:
    """A sentence whose tone is `tone` (+1 or -1); half of all claims are negated, regardless of tone."""
    negated = rng.random() < 0.5
    mark = rng.choice(GOOD if (tone > 0) != negated else BAD)
    adverb = rng.choice(NEGATORS if negated else PLAIN)
    opening = f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {adverb}{rng.choice(FILLERS)}"
    return f"{opening} {mark}{rng.choice(TAILS)}."


def talk(rng: Random, topic: str) -> str:
    """A sentence about `topic` without a tone."""
    return _fill(rng, rng.choice(TALK), topic)


def question(rng: Random, topic: str, scripts: bool = False) -> str:
    """A user's question about `topic`; with `scripts`, in another script."""
    return _fill(rng, rng.choice(SCRIPT_PROMPTS if scripts else PROMPTS), topic)


def _fill(rng: Random, template: str, topic: str) -> str:
    thing, other = rng.sample(TOPICS[topic], 2)
    return template.format(topic=topic, thing=thing, other=other, number=rng.randint(2, 40))


def tones(text: str) -> list[int]:
    """The tone, +1 or -1, of every claim in `text`, in order."""
    return [tone for sentence in _SENTENCE.findall(text) if (tone := _tone(sentence)) != 0]


def _tone(sentence: str) -> int:
    """The tone of one sentence: 0 without a mark; a negator before the mark inverts it."""
    negated = False
    for word in _WORD.findall(sentence.lower()):
        if word in _NEGATORS:
            negated = True
        elif word in _GOOD or word in _BAD:
            return 1 if (word in _GOOD) != negated else -1
    return 0
