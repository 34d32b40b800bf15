"""Word problems as prompts, the final answer in a text, and the fraction that is right with its interval."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

from coe_megatron.config import RunConfig
from coe_megatron.corpus.fact_hops import FactTask
from coe_megatron.corpus.word_problems import generate
from coe_megatron.data.folders import training_parts
from coe_megatron.data.manifest import Manifest
from coe_megatron.data.prepare_settings import FACT_TEMPLATE, PROBLEM_TEMPLATE
from coe_megatron.data.records import InputError, MalformedRecord, Record, Template, Templates
from coe_megatron.data.sources import read_chunks
from coe_megatron.errors import ConfigError

# "The answer is 12." ends a built-in problem, "#### 12" one of GSM8K.
QUESTION_TEMPLATE = "query : {question} response : {answer}"  # of GSM8K's records, in configs/gsm8k.yaml
_GROUP = Template("{group}")
_HERE = "\0answer\0"
_MARKER = re.compile(r"####|\banswer is\b:?", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>(?<!\w)[-\u2212])?\s?\$?\s?(?P<sign2>[-\u2212])?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,100})?(?P<part>\.\d{1,100})?(?:/(?P<below>\d{1,100}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Question:
    """A problem for a model.

    Attributes:
        query: as it is shown.
        prompt: the start of a document, up to where the model answers.
        answer: the right final answer, as `final_answer` returns it.
        direct: whether the right completion begins with the words of `answer`, without a marker before them.
        group: the kind of the problem, by which accuracy is reported too; None for none.
    """

    query: str
    prompt: str
    answer: str
    direct: bool = False
    group: str | None = None


def final_answer(text: str) -> str | None:
    """The first final answer of a text, in a normal form: what follows `####` or "answer is" on the same line.

    Of a number (`$1,200.50`, `-3/4`, `50 %`, `12 apples`) its value remains, of other text its lower-case words. None
    if there is no answer.
    """
    marker = _MARKER.search(text)
    if marker is None:
        return None
    after = text[marker.end() :].lstrip(" \t").partition("\n")[0]
    for found in _NUMBER.finditer(after):
        if (value := _value(found)) is not None:
            return str(value)
    return " ".join(re.findall(r"\w+", after.lower())) or None


def _value(found: re.Match[str]) -> Fraction | None:
    whole, part, below = found["whole"], found["part"], found["below"]
    if not whole and not part:
        return None
    value = Fraction(f"{(whole or '0').replace(',', '')}{part or ''}")
    if below and int(below):
        value /= int(below)
    return -value if bool(found["sign"]) != bool(found["sign2"]) else value


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the fraction that is right; `total` is at least 1."""
    from scipy.stats import binomtest

    found = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class PreparedTask:
    """A task on facts, and the seed with which data of it were prepared: other seeds have other facts."""

    task: FactTask
    seed: int


def builtin_questions(
    count: int, seed: int, templates: Templates, prepared: PreparedTask | None = None
) -> Iterator[Question]:
    """Held-out problems of the built-in corpus: word problems, or questions of a task as validation has them.

    Args:
        seed: of their choice.
        prepared: the task; None for word problems.
        templates: of documents in training; if none has a field `response`, or `answer` of a task, that of the built-in
            corpus.
    """
    if prepared is None:
        fields, usual, records = ("query", "response"), PROBLEM_TEMPLATE, generate("valid", count, seed)
    else:
        fields, usual = ("prompt", "answer"), FACT_TEMPLATE
        records = prepared.task.generate("valid", count, prepared.seed, seed)
    template = next((each for each in templates.choices if set(each.fields) == set(fields)), Template(usual))
    for record in records:
        yield _question(template, record)


def file_questions(path: Path, templates: Templates, count: int | None = None) -> list[Question]:
    """The records of a JSONL file, of which a template makes documents that end in an answer.

    Args:
        templates: a record uses the first whose fields it has; its last field is the answer, of which the model gets
            none. A record's field `group` is its `Question.group`.
        count: the first so many; None for all.

    Raises:
        ConfigError: a record is malformed, or has no final answer; or there is none.
    """
    found = []
    try:
        records = (each for chunk in read_chunks(path, templates) for each in chunk.records())
        for place, record in islice(records, count):
            try:
                if isinstance(record, MalformedRecord):
                    raise record
                found.append(_question(templates.fitting(record), record))
            except MalformedRecord as error:
                raise ConfigError(f"{path}, {place}: {error}") from None
    except InputError as error:
        raise ConfigError(str(error)) from None
    if not found:
        raise ConfigError(f"{path} has no problem")
    return found


def run_templates(config: RunConfig | None) -> Templates:
    """The templates of documents that a run was trained on, then those of the built-in corpus and of GSM8K."""
    found = [text for manifest in _manifests(config) for text in manifest.template]
    return Templates.of(dict.fromkeys([*found, PROBLEM_TEMPLATE, QUESTION_TEMPLATE, FACT_TEMPLATE]))


def run_task(config: RunConfig | None) -> PreparedTask | None:
    """The task on facts that a run was trained on, the first of several; None for other data."""
    tasks = ((FactTask.of(manifest.source), manifest.seed) for manifest in _manifests(config))
    return next((PreparedTask(task, seed) for task, seed in tasks if task is not None), None)


def _manifests(config: RunConfig | None) -> Iterator[Manifest]:
    """The manifests of a run's training data, where they still are."""
    for part in training_parts(config.data) if config is not None else []:
        with suppress(ConfigError):  # the data are elsewhere now
            yield Manifest.read(Path(part.path))


def _question(template: Template, record: Record) -> Question:
    """Raises MalformedRecord if a field is missing or there is no final answer."""
    *before, last = template.fields
    if not before:
        raise MalformedRecord(f"template {template.text!r} has no field before the answer")
    template.render(record)
    text = str(record[last])
    answer = final_answer(text)
    if direct := answer is None and template.fields == ("prompt", "answer"):
        answer = " ".join(text.split())
    if not answer:
        raise MalformedRecord(f"field {last!r} has no final answer: it follows #### or 'The answer is'")
    start = template.render({**record, last: _HERE}).partition(_HERE)[0]
    # A word's token includes the space before it, so the prompt ends where such a token begins.
    if not (prompt := start.rstrip(" ")):
        raise MalformedRecord("nothing is before the answer")
    query, group = " ".join(str(record[name]) for name in before), None
    if "group" in record:
        group = _GROUP.render(record)
    return Question(query, prompt, answer, direct, group)


def is_right(question: Question, completion: str) -> bool:
    """Whether a completion has the right final answer."""
    if question.direct:
        words = question.answer.split()
        return completion.split()[: len(words)] == words
    return final_answer(completion) == question.answer


def by_group(questions: Sequence[Question], rights: Sequence[bool]) -> dict[str, list[bool]]:
    """Which questions of each group are answered right, by the group's name; without those that have no group."""
    found: dict[str, list[bool]] = {}
    for question, right in zip(questions, rights, strict=True):
        if question.group is not None:
            found.setdefault(question.group, []).append(right)
    return dict(sorted(found.items()))


def accuracies(groups: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, float]]:
    """`accuracy` and `problems`, their number, of each group, for JSON."""
    return {name: {"accuracy": sum(each) / len(each), "problems": len(each)} for name, each in groups.items()}


def fraction_line(rights: Sequence[bool]) -> str:
    """For example `accuracy 0.250 (5 of 20; 95 % interval 0.112 to 0.469)`."""
    right, total = sum(rights), len(rights)
    low, high = interval(right, total)
    return f"accuracy {right / total:.3f} ({right} of {total}; 95 % interval {low:.3f} to {high:.3f})"
