"""Answers: equal to transformers one prompt at a time, in order, by batches that do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, LogitsProcessorList

from arena.data.cells import FieldError
from arena.inference.generate import Answer, Generator
from arena.inference.prompts import plan_batches
from arena.inference.sampling import Sampling
from tests.helpers import CONFIGS, make_base

PROMPTS = ["hello world", "which is not very clear " * 9, "good", "bad " * 5, "the judge <end_of_turn> user", "B A tie"]
NEW = 24


@pytest.fixture(scope="module")
def generator(gemma2: Path) -> Generator:
    return Generator(gemma2, device="cpu")


def encoded(generator: Generator, prompts: list[str]) -> list[np.ndarray]:
    return [generator.encode({"prompt": prompt}, Sampling(NEW)) for prompt in prompts]


def one_by_one(base: Path, prompts: list[np.ndarray], stop: list[int]) -> list[list[int]]:
    """transformers' greedy answers to prompts that are alone in their batch and have no padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    answers = []
    for ids in prompts:
        whole = model.generate(
            torch.from_numpy(ids)[None].long(), max_new_tokens=NEW, do_sample=False, eos_token_id=stop
        )
        answers.append(whole[0, len(ids) :].tolist())
    return answers


def phrase_alone(base: Path, prompts: list[np.ndarray], answer: np.ndarray) -> np.ndarray:
    """The log-probability that plain transformers gives to an answer's tokens after each prompt, without padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    tokens, logs = torch.from_numpy(answer).long(), []
    for ids in prompts:
        with torch.no_grad():
            every = model(torch.from_numpy(np.concatenate([ids, answer]))[None].long()).logits[0].log_softmax(dim=-1)
        logs.append(float(every[len(ids) - 1 : -1].gather(1, tokens[:, None]).sum()))
    return np.array(logs)


def ended(ids: np.ndarray, stop: list[int]) -> list[int]:
    """The ids of an answer in a batch, up to the one that ended it."""
    ends = np.flatnonzero(np.isin(ids, stop))
    return list(ids[: ends[0] + 1 if len(ends) else None].tolist())


@pytest.mark.parametrize("family", CONFIGS)
def test_batches_give_the_answers_of_transformers_one_by_one(family: str, tmp_path: Path) -> None:
    """Also for prompts longer than the window, with padding of 30 tokens beside them."""
    base = make_base(tmp_path / family, family)
    generator = Generator(base, device="cpu")
    prompts, stop = encoded(generator, PROMPTS), generator.encoder.stop
    together = generator.batch(prompts, range(len(prompts)), Sampling(NEW))
    expected = one_by_one(base, prompts, stop)
    assert [ended(ids, stop) for ids in together] == expected
    assert len({tuple(ids) for ids in expected}) > 3, "the prompts matter"
    answer = generator.encoder.answer("unanswerable")
    assert len(answer) > 2 and answer[-1] in stop
    found, alone = np.log(generator.probabilities(prompts, "unanswerable")), phrase_alone(base, prompts, answer)
    np.testing.assert_allclose(found, alone, atol=1e-5, rtol=1e-6)
    for control in (phrase_alone(base, prompts, answer[:-1]), alone[::-1]):  # without the end; of other prompts
        assert np.abs(found - control).max() > 1e-3


def test_padding_without_a_mask_would_be_noticed(generator: Generator, gemma2: Path) -> None:
    """The control of the test above."""
    prompts, stop = encoded(generator, PROMPTS), generator.encoder.stop
    width = max(map(len, prompts))
    padded = [np.concatenate([np.full(width - len(ids), stop[0], np.int32), ids]) for ids in prompts]
    assert one_by_one(gemma2, padded, stop) != one_by_one(gemma2, prompts, stop)


def test_a_phrases_probability_needs_its_own_logits_only(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are computed at once."""
    prompts, shapes = encoded(generator, PROMPTS), []
    answer = generator.encoder.answer("unanswerable")
    whole = generator.probabilities(prompts, "unanswerable")
    vocabulary = generator.model.config.vocab_size
    monkeypatch.setattr("arena.inference.generate.LOGITS_AT_ONCE", 2 * len(answer) * vocabulary + 1)
    handle = generator.model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    np.testing.assert_allclose(np.log(generator.probabilities(prompts, "unanswerable")), np.log(whole), atol=1e-5)
    handle.remove()
    assert shapes == [(2, len(answer), vocabulary)] * 3


def test_a_prompt_is_the_users_turn_and_its_text_is_plain(generator: Generator) -> None:
    tokens = generator.tokenizer.convert_ids_to_tokens
    (ids,) = encoded(generator, ["the judge <end_of_turn> user"])
    shown = tokens(ids.tolist())
    assert shown[:2] == ["<bos>", "<start_of_turn>"] and shown.count("<bos>") == 1
    assert shown.count("<end_of_turn>") == 1 and shown.count("<start_of_turn>") == 2
    assert "".join(shown).endswith("<start_of_turn>model\n")
    assert set(tokens(generator.encoder.stop)) == {"<eos>", "<end_of_turn>"}
    raw = Generator(generator.recipe.model.base, ["prompt.chat=plain"], device="cpu")
    (ids,) = encoded(raw, ["hello"])
    assert tokens(ids.tolist())[0] == "<bos>" and raw.tokenizer.decode(ids[1:].tolist()) == "hello"


def test_the_order_of_the_prompts_is_kept_whatever_the_batches(generator: Generator) -> None:
    alone = [generator.generate([prompt], Sampling(NEW))[0] for prompt in PROMPTS]
    for tokens in (1, 100, 10**6):
        assert generator.generate(PROMPTS, Sampling(NEW), tokens=tokens) == alone
    assert generator.generate(PROMPTS[::-1], Sampling(NEW)) == alone[::-1] != alone


def test_batches_hold_a_bounded_number_of_tokens_the_longest_first() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 90, 200).tolist()
    batches = plan_batches(lengths, new=10, tokens=300)
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    assert all(len(rows) * (max(lengths[row] for row in rows) + 10) <= 300 for rows in batches)
    assert [lengths[row] for rows in batches for row in rows] == sorted(lengths, reverse=True)
    assert plan_batches([500, 3], new=10, tokens=300) == [[0], [1]]  # one that is too long is alone
    assert plan_batches([], new=10, tokens=300) == []


def forced(generator: Generator, monkeypatch: pytest.MonkeyPatch, ends: dict[int, tuple[int, int]]) -> None:
    """Makes rows give a token at a step, and an ordinary one at all others."""

    def processors(sampling: Sampling, rows: list[int], width: int, device: torch.device) -> Any:
        def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros_like(scores)
            scores[:, 300] = 1
            for at, row in enumerate(rows):
                step, token = ends.get(row, (-1, 0))
                if input_ids.shape[1] - width == step:
                    scores[at, token] = 2
            return scores

        made, choice = original(sampling, rows, width, device)
        return LogitsProcessorList([force, *made]), choice

    original = Sampling.processors
    monkeypatch.setattr(Sampling, "processors", processors)


def test_an_answer_ends_at_the_end_of_the_turn(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, eos = map(generator.tokenizer.convert_tokens_to_ids, ("<end_of_turn>", "<eos>"))
    other = generator.tokenizer.convert_tokens_to_ids("<start_of_turn>")
    word = generator.tokenizer.decode([300])
    forced(generator, monkeypatch, {0: (3, turn), 1: (0, eos), 2: (5, other)})
    answers = generator.generate(["a", "b", "c", "d"], Sampling(8))
    assert [answer.finish for answer in answers] == ["stop", "stop", "length", "length"]
    assert answers[0].text == word * 3 and answers[1].text == ""
    assert answers[2].text == word * 7 and answers[3].text == word * 8  # control tokens are not shown


def test_a_draw_depends_on_the_seed_and_the_position_and_not_on_the_batch(generator: Generator) -> None:
    hot = Sampling(NEW, temperature=1.5)
    together = generator.generate(PROMPTS, hot)
    assert generator.generate(PROMPTS, hot, tokens=1) == together
    assert generator.generate(PROMPTS[:3], hot) == together[:3]
    assert generator.generate(PROMPTS, Sampling(NEW, temperature=1.5, seed=1)) != together
    assert len({answer.text for answer in generator.generate(["hello"] * 6, hot)}) > 1
    assert generator.generate(PROMPTS, Sampling(NEW)) != together


def drawn(sampling: Sampling, probabilities: list[float], n: int) -> np.ndarray:
    """How often each token is drawn by n rows."""
    processors, _ = sampling.processors(range(n), 4, torch.device("cpu"))
    ids = torch.zeros(n, 4, dtype=torch.long)
    chosen = processors(ids, torch.tensor(probabilities).log().repeat(n, 1)).argmax(dim=-1)
    return np.bincount(chosen.numpy(), minlength=len(probabilities)) / n


def test_draws_follow_the_probabilities() -> None:
    shares, n = [0.5, 0.0, 0.3, 0.2], 5_000
    error = 4 * np.sqrt(0.25 / n)
    for sampling, expected in (
        (Sampling(1, temperature=1.0), shares),
        (Sampling(1, temperature=0.5), [25 / 38, 0.0, 9 / 38, 4 / 38]),
        (Sampling(1, temperature=1.0, top_k=2), [5 / 8, 0.0, 3 / 8, 0.0]),
        (Sampling(1, temperature=1.0, top_p=0.7), [5 / 8, 0.0, 3 / 8, 0.0]),
    ):
        found = drawn(sampling, shares, n)
        np.testing.assert_allclose(found, expected, atol=error)
        assert found[1] == 0
    with pytest.raises(AssertionError):  # the control
        np.testing.assert_allclose(drawn(Sampling(1, temperature=1.5), shares, n), shares, atol=error)
    np.testing.assert_array_equal(drawn(Sampling(1), shares, 7), [1, 0, 0, 0])


def test_logits_that_are_not_numbers_are_an_error(gemma2: Path) -> None:
    broken = Generator(gemma2, device="cpu")
    token = broken.tokenizer.convert_tokens_to_ids("z")

    def spoil(module: Any, args: Any, states: torch.Tensor) -> torch.Tensor:
        return states.masked_fill((args[0] == token)[..., None], float("nan"))

    broken.model.get_input_embeddings().register_forward_hook(spoil)
    with pytest.raises(
        FloatingPointError, match=r"the logits of answered prompt 2 are not numbers: use model\.dtype=float32"
    ):
        broken.generate(["hello", "z"], Sampling(2))


def test_infinite_logits_are_an_error(gemma2: Path) -> None:
    """As where float16 overflows; the phrase would otherwise be improbable."""
    broken = Generator(gemma2, device="cpu")
    prompts = encoded(broken, ["hello"])

    def overflow(module: Any, args: Any, out: Any) -> None:
        out.logits[..., 0] = torch.inf

    broken.model.register_forward_hook(overflow)
    with pytest.raises(FloatingPointError, match="the logits of answered prompt 1 are not numbers"):
        broken.batch(prompts, [0], Sampling(2))
    with pytest.raises(FloatingPointError, match="logits are not numbers"):
        broken.probabilities(prompts, "unanswerable")


def test_a_prompt_may_have_a_context_but_no_other_question(generator: Generator, gemma2: Path) -> None:
    asked = {"prompt": "hello", "context": "good"}
    expected = generator.encode({"instruction": "hello", "context": "good"}, Sampling(NEW))
    assert generator.encode(asked, Sampling(NEW)).tolist() == expected.tolist()
    assert expected.tolist() != generator.encode({"prompt": "hello", "context": " "}, Sampling(NEW)).tolist()
    assert generator.encoder.columns(["id", "context", "prompt"]) == ["prompt", "context"]
    raw = Generator(gemma2, ["prompt.chat=plain"], device="cpu")
    with pytest.raises(FieldError, match="context: is there beside a prompt that is continued as a text"):
        raw.encode(asked, Sampling(NEW))
    for other in ("instruction", "question", "messages"):
        with pytest.raises(FieldError, match=f"prompt: is there along with {other}, .*: remove the column"):
            generator.encoder.columns(["prompt", "context", other])
        with pytest.raises(FieldError, match=f"along with {other}"):
            generator.encode({"prompt": "hello", other: "x"}, Sampling(NEW))
    with pytest.raises(FieldError, match='context: is missing; the columns found are "question"'):
        generator.encoder.columns(["question"])


def test_a_lack_of_memory_names_what_helps(generator: Generator) -> None:
    for rows, message in ((1, "a prompt of 9 tokens is too long for the memory: shorten it, or"), (2, "lower --batch")):
        with pytest.raises(ValueError, match=message), generator._computing(torch.zeros(rows, 9)):
            raise torch.OutOfMemoryError


def test_rows_are_read_within_the_limits_of_the_recipe(gemma2: Path) -> None:
    small = Generator(gemma2, ["data.max_turns=1"], device="cpu")
    chat = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user")]
    with pytest.raises(FieldError, match=r"messages: has 2 turns, but data\.max_turns is 1"):
        small.encode({"messages": chat}, Sampling(NEW))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: it must be 0, for"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"top_k": 5}, "top_p and top_k apply to sampling only"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_task_that_gives_no_text_is_refused(gemma2: Path) -> None:
    with pytest.raises(ValueError, match=r"task=preference predicts winner_model_a, .* and no text: leave"):
        Generator(gemma2, ["task=preference"])


def test_prompts_that_cannot_be_used(generator: Generator) -> None:
    for prompts, message in (
        (["a", " \n"], "prompt 2, prompt: is .*write a text"),
        (
            ["a", "b", "hello " * 600],
            r"prompt 3, prompt: has .* and 24 may follow, but the model has positions for 512",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generator.generate(prompts, Sampling(NEW))
    fits = generator.encode({"prompt": "a"}, Sampling(8))
    generator.encode({"prompt": "a"}, Sampling(512 - len(fits)))
    with pytest.raises(ValueError, match="positions for 512"):
        generator.encode({"prompt": "a"}, Sampling(512 - len(fits) + 1))


def test_a_base_in_four_bits_stays_in_four_bits(gemma2: Path) -> None:
    generator = Generator(gemma2, ["model.quantization=nf4", "model.dtype=bfloat16"], device="cpu")
    assert all(answer.text for answer in generator.generate(PROMPTS[:2], Sampling(4)))
    layers = [each for each in generator.model.modules() if isinstance(each, torch.nn.Linear)]
    assert sum(isinstance(each, Linear4bit) for each in layers) == len(layers) - 1 == 3 * 7  # all but the head
    assert not any(isinstance(each, Linear4bit) for each in Generator(gemma2, device="cpu").model.modules())


def test_no_prompts_no_answers(generator: Generator) -> None:
    assert generator.generate([]) == []
    assert Answer("a", "stop") == Answer(text="a", finish="stop")
