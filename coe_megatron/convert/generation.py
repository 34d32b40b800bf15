"""Text from a model that `load` returned: prompts in a batch, greedily or sampled, by transformers' generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from coe_megatron import extras
from coe_megatron.errors import ConfigError
from coe_megatron.text import shortened

Finish = Literal["eos", "stop", "length"]
_LEAST_TOKENS, _NO_CONTEXT = 32, 512  # without a limit: at least, and if the model has no length of its own


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a text ends.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: sample among the most likely tokens whose probabilities sum to this.
        max_tokens: limit for each text; None for what the length of training leaves, at least 32.
        stop: texts that end a completion, which does not include them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What the model adds to a prompt.

    Attributes:
        text: without the prompt, the end of the document, and a stop text.
        tokens: number of tokens generated, with the end of the document.
        finish: why it ended: end of the document, a stop text, or the limit.
    """

    prompt: str
    text: str
    tokens: int
    finish: Finish


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    special_tokens: bool = True,
    show: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[Completion]:
    """Continue prompts, all together, in the global random state of torch.

    Args:
        model, tokenizer: as `load` returns them.
        special_tokens: whether the tokenizer adds its own, such as a bos token; those of runs add none.
        show: takes the text of a single prompt piece by piece, never a part of a character or of a stop text.
        warn: takes a line if prompt and completion are longer than any text in training.

    Raises:
        ConfigError: a prompt has no tokens.
    """
    assert prompts and (show is None or len(prompts) == 1)
    library = extras.require("transformers")
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=special_tokens, verbose=False).input_ids
        if not ids:
            raise ConfigError("a prompt is empty: the model needs at least one token")
        limit, context = _limit(model, len(ids), sampling.max_tokens)
        if context and len(ids) + limit > context:
            start, more = shortened(repr(prompt), 60), f"up to {limit} more exceed the {context} of a text in training"
            warn(f"prompt {start} has {len(ids)} tokens, which with {more}")
        texts.append(_Text(tokenizer, prompt, ids, limit, sampling.stop, show))
    longest = max(len(text.ids) for text in texts)
    # Of a prompt that is shorter than others, the left is padded; the mask says so.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    rows = torch.tensor([[padding] * (longest - len(text.ids)) + text.ids for text in texts])
    mask = torch.tensor([[0] * (longest - len(text.ids)) + [1] * len(text.ids) for text in texts])
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    padded_rows = list(range(len(tokenizer), model.config.vocab_size))  # of the embedding: no tokens
    with torch.inference_mode():
        model.generate(
            rows.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(text.limit for text in texts),
            do_sample=bool(sampled),
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
            suppress_tokens=padded_rows or None,
            stopping_criteria=library.StoppingCriteriaList([_stopping(texts, model.device)]),
            **sampled,
        )
    return [text.completion() for text in texts]


def _limit(model: Any, length: int, wanted: int | None) -> tuple[int, int | None]:
    """The most tokens to add to a prompt of `length` tokens, and the longest text in training, if known."""
    context = getattr(model.config, "max_position_embeddings", None)
    return wanted or (max(context - length, _LEAST_TOKENS) if context else _NO_CONTEXT), context


def _stopping(texts: "Sequence[_Text]", device: torch.device) -> Callable[..., torch.Tensor]:
    """transformers' criterion: which rows [B] bool have ended, called after every token."""

    def ended(rows: torch.Tensor, _scores: Any, **_more: Any) -> torch.Tensor:
        for text, token in zip(texts, rows[:, -1].tolist(), strict=True):
            text.add(token)
        return torch.tensor([text.finish is not None for text in texts], device=device)

    return ended


class _Text:
    """A completion while it grows."""

    def __init__(
        self, tokenizer: Any, prompt: str, ids: list[int], limit: int, stop: Sequence[str],
        show: Callable[[str], None] | None,
    ) -> None:  # fmt: skip
        self.prompt, self.ids, self.limit = prompt, ids, limit
        self._tokenizer, self._stop, self._show = tokenizer, stop, show
        self._start = len(self._decode(ids))  # some tokenizers decode the start of a text in another way
        self._new: list[int] = []
        self._tokens = self._shown = 0
        self.finish: Finish | None = None

    def add(self, token: int) -> None:
        """Add a token, unless the text has ended: then it is padding."""
        if self.finish is not None:
            return
        self._tokens += 1
        if token == self._tokenizer.eos_token_id:
            self.finish = "eos"
        else:
            self._new.append(token)
            if self._stop and self._stop_at(self._text()) is not None:
                self.finish = "stop"
            elif self._tokens >= self.limit:
                self.finish = "length"
        if self._show is not None:
            self._show_more(self._show)

    def completion(self) -> Completion:
        assert self.finish is not None
        text = self._text()
        return Completion(self.prompt, text[: self._stop_at(text)], self._tokens, self.finish)

    def _show_more(self, show: Callable[[str], None]) -> None:
        text = self._text()
        ready = text[: self._stop_at(text)] if self.finish else text[: len(text) - self._held_back(text)]
        if more := ready[self._shown :]:
            show(more)
            self._shown = len(ready)

    def _held_back(self, text: str) -> int:
        """The number of last characters that may be part of a character of several tokens, or of a stop text."""
        incomplete = len(text) - len(text.rstrip("\ufffd"))
        longest = min(len(text), max(map(len, self._stop), default=0))
        partial = (size for size in range(longest, 0, -1) if any(each.startswith(text[-size:]) for each in self._stop))
        return max(incomplete, next(partial, 0))

    def _stop_at(self, text: str) -> int | None:
        """Where the first stop text begins."""
        return min((place for each in self._stop if (place := text.find(each)) >= 0), default=None)

    def _text(self) -> str:
        return self._decode([*self.ids, *self._new])[self._start :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
