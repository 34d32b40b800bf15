"""Generated text against a loop over the model's own logits; where a text ends, and what is shown while it grows."""

import pytest
import torch

from coe_megatron.convert.generation import Completion, Sampling, _Text, generate
from coe_megatron.convert.load import load
from coe_megatron.errors import ConfigError

pytestmark = pytest.mark.run
PROMPTS = ["query : Tom has 3 apples. How many", "query :", "query : A train travels 60 miles in 2 hours, and"]


@pytest.fixture(scope="module")
def loaded(finished):
    return load(finished)


def greedy(model, tokenizer, prompt: str, count: int) -> list[int]:
    """The most likely tokens, one at a time, without a cache, a batch or transformers' generation."""
    ids = tokenizer(prompt).input_ids
    new: list[int] = []
    while len(new) < count and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(int(logits[: len(tokenizer)].argmax()))
    return new


def test_a_batch_gives_what_each_prompt_gives_alone(loaded) -> None:
    model, tokenizer = loaded
    together = generate(model, tokenizer, PROMPTS, Sampling(max_tokens=9))
    for prompt, found in zip(PROMPTS, together, strict=True):
        expected = greedy(model, tokenizer, prompt, 9)
        text = tokenizer.decode(expected, skip_special_tokens=True)
        ended = expected[-1] == tokenizer.eos_token_id
        assert found == Completion(prompt, text, len(expected), "eos" if ended else "length")


def test_the_end_of_a_document_ends_a_text(loaded) -> None:
    """Of a model whose most likely token is always the same."""
    model, tokenizer = loaded
    favourite = tokenizer.eos_token_id

    def prefers(_module, _inputs, logits):
        logits[..., favourite] += 1000

    with model.lm_head.register_forward_hook(prefers):
        assert generate(model, tokenizer, PROMPTS, Sampling()) == [Completion(each, "", 1, "eos") for each in PROMPTS]
        favourite = tokenizer("7").input_ids[-1]
        limits = [found.tokens for found in generate(model, tokenizer, PROMPTS, Sampling())]
    assert limits == [32, 32, 32]  # the length of training leaves less


def test_padded_rows_of_the_embedding_are_no_tokens(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded

    def prefers(_module, _inputs, logits):
        logits[..., 400:] += 1000

    with model.lm_head.register_forward_hook(prefers):
        before = generate(model, tokenizer, PROMPTS[:1], Sampling(max_tokens=4))[0]
        monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 400)
        after = generate(model, tokenizer, PROMPTS[:1], Sampling(max_tokens=4))[0]
    assert min(tokenizer(before.text).input_ids) >= 400 > max(tokenizer(after.text).input_ids)


@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_text_ends_it_before(loaded, size: int) -> None:
    model, tokenizer = loaded
    (whole,) = generate(model, tokenizer, [PROMPTS[0]], Sampling(max_tokens=12))
    stop = whole.text[4 : 4 + size]
    shown: list[str] = []
    (found,) = generate(model, tokenizer, [PROMPTS[0]], Sampling(max_tokens=12, stop=("\0", stop)), show=shown.append)
    assert found.text == whole.text[: whole.text.find(stop)] == "".join(shown)
    assert found.finish == "stop" and found.tokens <= whole.tokens


def test_a_seed_gives_the_same_sample_and_another_another(loaded) -> None:
    model, tokenizer = loaded

    def sample(seed: int, **more: float) -> str:
        torch.manual_seed(seed)
        return generate(model, tokenizer, PROMPTS[:1], Sampling(temperature=2.0, max_tokens=12, **more))[0].text

    assert sample(1) == sample(1) != sample(2)
    (likely,) = generate(model, tokenizer, PROMPTS[:1], Sampling(max_tokens=12))
    assert sample(1, top_p=1e-6) == likely.text  # only the most likely token is left


def test_a_text_longer_than_any_in_training_is_warned_about(loaded) -> None:
    model, tokenizer = loaded
    warnings: list[str] = []
    generate(model, tokenizer, ["query :"], Sampling(max_tokens=2), warn=warnings.append)
    assert warnings == []
    generate(model, tokenizer, ["query : " + "word " * 60], Sampling(max_tokens=2), warn=warnings.append)
    (line,) = warnings
    assert "up to 2 more exceed the 32 of a text in training" in line and "\n" not in line


def test_a_prompt_without_tokens_is_refused(loaded) -> None:
    with pytest.raises(ConfigError, match="a prompt is empty"):
        generate(*loaded, ["query", ""], Sampling())


@pytest.mark.parametrize("text", ["na\u00efve \u65e5\u672c\u8a9e \U0001f642\u200d\u2642 end", "plain words"])
def test_what_is_shown_has_whole_characters_and_no_start_of_a_stop_text(loaded, text: str) -> None:
    """A character of several bytes is several tokens."""
    _, tokenizer = loaded
    shown: list[str] = []
    growing = _Text(tokenizer, "query :", tokenizer("query :").input_ids, 1000, ("###", "en!"), shown.append)
    for token in tokenizer(text).input_ids:
        growing.add(token)
        assert not any("\ufffd" in piece for piece in shown)
    held = text.removesuffix("en") if text.endswith("en") else text
    assert "".join(shown) == held
    growing.add(tokenizer("#").input_ids[-1])
    assert "".join(shown) == held and growing.finish is None
    growing.add(tokenizer.eos_token_id)
    growing.add(tokenizer.pad_token_id)
    assert "".join(shown) == f"{text}#" == growing.completion().text
