"""Final answers in texts, how they are compared, and the interval of the fraction that is right."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe_megatron.config import RunConfig
from coe_megatron.config.settings import DataSettings
from coe_megatron.convert import answers
from coe_megatron.corpus.fact_hops import FactTask
from coe_megatron.corpus.word_problems import generate
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.records import Templates
from coe_megatron.errors import ConfigError

WHOLE = st.integers(-(10**12), 10**12)
BUILTIN = Templates.of(["query : {query} response : {response}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("33 * 16 = $<<33*16=528>>528\nLee earned $558.\n#### 558", "558"),
        ("#### 1,234,567", "1234567"),
        ("So 3 + 4 = 7. The answer is 7.", "7"),
        ("The answer is $12.50.", "25/2"),
        ("the ANSWER IS: -3", "-3"),
        ("The answer is \u22123.", "-3"),
        ("The answer is -$3", "-3"),
        ("The answer is $-3", "-3"),
        ("The answer is 3/4", "3/4"),
        ("The answer is 6/8 of it", "3/4"),
        ("The answer is .5", "1/2"),
        ("The answer is 50 %", "50"),
        ("The answer is 12 apples, not 13.", "12"),
        ("The answer is 5/0", "5"),
        ("The answer is 1,2", "1"),  # no thousands
        ("The answer is yes.", "yes"),
        ("The answer is (B) Twice  as many", "b twice as many"),
        ("#### 4\nThe answer is 5.", "4"),  # the first: after it another text may begin
        ("The answer is 3. query : ... The answer is 4.", "3"),
        ("####\n7", None),
        ("The answer is", None),
        ("It is 7.", None),
        ("", None),
    ],
)
def test_the_final_answer_of_a_text(text: str, expected: str | None) -> None:
    assert answers.final_answer(text) == expected


@given(WHOLE, st.integers(0, 3), st.sampled_from(["####", "The answer is", "so the answer is:"]), st.text(max_size=20))
def test_a_number_has_one_form(number: int, decimals: int, marker: str, before: str) -> None:
    """However many zeros, with a $, with commas: the same answer; the text before the marker does not matter."""
    if "####" in before or "answer is" in before.lower():
        return
    found = {
        answers.final_answer(f"{before} {marker} {written}")
        for sign, digits in [("-" if number < 0 else "", abs(number))]
        for zeros in ["", "." + "0" * (decimals + 1)]
        for written in [f"{sign}{digits}{zeros}.", f"{sign}${digits:,}{zeros} in all", f"{sign}{digits:,}{zeros}\n99"]
    }
    assert found == {str(number)}


@given(WHOLE, WHOLE, st.integers(0, 6))
def test_numbers_are_equal_if_their_values_are(first: int, second: int, places: int) -> None:
    """Decimals keep their exact value: floats would not tell 10^12 + 10^-6 from 10^12."""
    one, two = (f"{'-' * (n < 0)}{abs(n) // 10**places}.{abs(n) % 10**places:0{places or 1}d}" for n in (first, second))
    found = [answers.final_answer(f"The answer is {each}.") for each in (one, two)]
    assert found == [str(Fraction(first, 10**places)), str(Fraction(second, 10**places))] or places == 0
    assert (found[0] == found[1]) == (first == second)


@given(st.text())
def test_any_text_is_an_answer_or_none(text: str) -> None:
    for marked in (text, f"#### {text}", f"The answer is {text}"):
        found = answers.final_answer(marked)
        assert found is None or (found and found == found.strip())


@given(st.integers(0, 300), st.integers(1, 300))
@settings(deadline=None)  # the first call imports scipy
def test_the_interval_is_wilsons(right: int, more: int) -> None:
    total = right + more - 1 or 1
    low, high = answers.interval(right, total)
    z, p = 1.959963984540054, right / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    assert low == pytest.approx(max(0, centre - half), abs=1e-9) and high == pytest.approx(centre + half, abs=1e-9)
    assert low - 1e-12 <= p <= high + 1e-12


def test_built_in_questions_begin_like_documents() -> None:
    asked = list(answers.builtin_questions(50, 3, BUILTIN))
    for question, problem in zip(asked, generate("valid", 50, 3), strict=True):
        document = BUILTIN.render(problem)
        assert document.startswith(f"{question.prompt} ") and question.prompt.endswith(" response :")
        assert document == f"{question.prompt} {problem['response']}" and question.query == problem["query"]
        assert answers.is_right(question, f" {problem['response']}")
        assert not answers.is_right(question, f" {problem['response']}".replace("answer is ", "answer is 1"))
        assert not answers.is_right(question, "")


def test_another_template_of_training_is_used() -> None:
    templates = Templates.of(["{question}", "Q: {query}\nA: {response}\n###"])
    (question,) = answers.builtin_questions(1, 0, templates)
    assert question.prompt == f"Q: {question.query}\nA:"


def write(folder, *records: object):
    path = folder / "problems.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_questions_of_a_file(tmp_path) -> None:
    path = write(tmp_path, {"q": "1 + 1?", "a": "It is 2.\n#### 2"}, {"q": "2 {q} + 2?", "a": "#### 4.0"})
    found = answers.file_questions(path, Templates.of(["{text}", "query : {q} response : {a}"]))
    assert found == [
        answers.Question("1 + 1?", "query : 1 + 1? response :", "2"),
        answers.Question("2 {q} + 2?", "query : 2 {q} + 2? response :", "4"),
    ]
    assert answers.file_questions(path, Templates.of(["{q}\n{a}"]), count=1)[0].prompt == "1 + 1?\n"


FACTS = Templates.of(["{prompt} {answer}"])


def test_a_direct_answer_is_the_first_words_of_a_completion(tmp_path) -> None:
    path = write(tmp_path, {"prompt": "r1 e2", "answer": " e3  e4 ", "group": 2}, {"prompt": "?", "answer": "#### 1.0"})
    direct, marked = answers.file_questions(path, FACTS)
    assert direct == answers.Question("r1 e2", "r1 e2", "e3 e4", direct=True, group="2")
    assert [answers.is_right(direct, text) for text in (" e3 e4", "e3 e4 e5", "e3", "e3 e44", "e4 e3", "")] == [
        *(True, True, False, False, False, False)
    ]
    assert (marked.answer, marked.direct, marked.group) == ("1", False, None)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "?", "answer": " "}, "field 'answer' has no final answer"),
        ({"prompt": " ", "answer": "e3"}, "nothing is before the answer"),
        ({"prompt": "?", "answer": "e3", "group": None}, "field 'group' is NoneType: it must be text or a number"),
    ],
)
def test_a_direct_question_that_cannot_be_asked_is_refused(tmp_path, record: object, said: str) -> None:
    with pytest.raises(ConfigError, match=f"line 1: {said}"):
        answers.file_questions(write(tmp_path, record), FACTS)


def test_questions_of_a_task_are_those_of_its_data(tmp_path) -> None:
    task = FactTask("recall", 8, 4)
    prepare(PrepareSettings(tmp_path / "data", builtin=60, task=task, seed=7))
    config = RunConfig(data=DataSettings(path=str(tmp_path / "data")))
    prepared = answers.run_task(config)
    assert prepared == answers.PreparedTask(task, 7)
    asked = list(answers.builtin_questions(40, 1, answers.run_templates(config), prepared))
    assert asked != list(answers.builtin_questions(40, 2, answers.run_templates(config), prepared))
    for question, record in zip(asked, task.generate("valid", 40, 7, 1), strict=True):
        assert (question.prompt, question.answer, question.group) == tuple(record.values()) and question.direct
    assert answers.run_task(None) is None


def test_accuracy_by_group() -> None:
    asked = [answers.Question("", "", "", group=group) for group in ("2 hops", None, "1 hop", "2 hops")]
    groups = answers.by_group(asked, [True, True, False, False])
    assert list(groups.items()) == [("1 hop", [False]), ("2 hops", [True, False])]
    assert answers.accuracies(groups)["2 hops"] == {"accuracy": 0.5, "problems": 2}


@pytest.mark.parametrize(
    ("record", "template", "said"),
    [
        ({"q": "1?", "a": "2"}, "{q} {a}", "line 2: field 'a' has no final answer"),
        ({"q": "1?"}, "{q} {a}", "line 2: field 'a' is missing"),
        ({"q": "1?", "a": None}, "{q} {a}", "line 2: field 'a' is NoneType"),
        ([1], "{q} {a}", "line 2: not a JSON object"),
        ({"q": "1?", "a": "#### 2"}, "{a}", "line 1: template '{a}' has no field before the answer"),
    ],
)
def test_a_problem_without_an_answer_is_refused(tmp_path, record: object, template: str, said: str) -> None:
    path = write(tmp_path, {"q": "1 + 1?", "a": "#### 2"}, record)
    with pytest.raises(ConfigError) as error:
        answers.file_questions(path, Templates.of([template]))
    assert said in str(error.value)


def test_a_file_without_problems_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="has no problem"):
        answers.file_questions(write(tmp_path), BUILTIN)


def test_all_answers_of_gsm8k_are_numbers(real_text) -> None:
    templates = Templates.of(["query : {question} response : {answer}"])
    found = answers.file_questions(real_text / "gsm8k_valid.jsonl", templates)
    lines = (real_text / "gsm8k_valid.jsonl").read_text().splitlines()
    assert len(found) == len(lines) > 100
    for question, line in zip(found, lines, strict=True):
        written = json.loads(line)["answer"].rpartition("#### ")[2]
        assert Fraction(question.answer) == Fraction(written.replace(",", ""))
