"""launch/generate.py on a tiny run: what it prints, its exit status, and mistakes in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, python

from coe_megatron.convert.answers import builtin_questions, final_answer
from coe_megatron.data.records import Templates

PROGRAM = "launch/generate.py"
pytestmark = pytest.mark.run
PROMPT = "query : Tom has 3 apples. How many"
COMMAND = [sys.executable, PROGRAM]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_prompts_and_files_give_the_same_texts(finished: Path, tmp_path: Path) -> None:
    options = (finished, "--max-tokens", 8)
    one = python(PROGRAM, *options, "--prompt", PROMPT)
    assert one.returncode == 0 and one.stderr == "", one.stderr
    text = one.stdout.removesuffix("\n")
    several = python(PROGRAM, *options, "--prompt", PROMPT, "query : \u65e5\u672c")
    assert several.stdout.startswith(f"{PROMPT}{text}\n\nquery : \u65e5\u672c")

    (tmp_path / "lines.txt").write_text(f"{PROMPT}\r\nquery :\n{PROMPT}")
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps({'p': each})}\n" for each in (PROMPT, "query :")))
    lines = python(PROGRAM, *options, "--file", tmp_path / "lines.txt", "--json", "--batch", 2)
    found = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [each["prompt"] for each in found] == [PROMPT, "query :", PROMPT]
    assert found[0] == found[2] == {"prompt": PROMPT, "text": text, "tokens": 8, "finish": "length"}
    records = python(PROGRAM, *options, "--file", tmp_path / "lines.jsonl", "--field", "p", "--json")
    assert [json.loads(line) for line in records.stdout.splitlines()] == found[:2]


def test_a_problem_is_asked_as_in_training_and_its_answer_judged(finished: Path) -> None:
    (question,) = builtin_questions(1, 5, Templates.of(["{text}"]))
    shown = python(PROGRAM, finished, "--problem", 5, "--max-tokens", 4)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"{question.query}\n")
    assert shown.stdout.endswith(f"\nThe right answer is {question.answer}: the model is wrong.\n")
    assert "exceed the 32 of a text in training" in shown.stderr and shown.stderr.count("\n") == 1
    found = json.loads(python(PROGRAM, finished, "--problem", 5, "--max-tokens", 4, "--json").stdout)
    assert found["prompt"] == question.prompt and found["answer"] == question.answer
    assert found["right"] == (final_answer(found["text"]) == question.answer)


def test_each_line_of_a_chat_is_a_prompt(finished: Path) -> None:
    command = [*COMMAND, finished, "--chat", "--max-tokens", "8"]
    lines = f"{PROMPT}\n\n{PROMPT}\n".encode() + b"\xff\n"
    done = subprocess.run(command, input=lines, capture_output=True, cwd=ROOT, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    first, second, *_ = done.stdout.decode().split("\n")
    assert first == second and first


def test_an_interrupted_chat_ends_with_130(finished: Path) -> None:
    command = [*COMMAND, finished, "--chat", "--max-tokens", "8"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes) as process:
        process.stdin.write(f"{PROMPT}\n".encode())
        process.stdin.flush()
        assert process.stdout.read(1)  # it runs
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, b"")


def test_a_checkpoint_and_an_export_give_the_text_of_their_run(finished: Path, prepared: Path, tmp_path: Path) -> None:
    done = python("launch/checkpoint.py", "export", finished, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    newest = max((finished / "checkpoints").iterdir())
    options = ("--prompt", PROMPT, "--max-tokens", 8, "--json")
    found = {
        python(PROGRAM, folder, *options, "--stop", "\0", *more).stdout
        for folder, *more in [(finished,), (newest, "--tokenizer", prepared / "tokenizer.model"), (tmp_path / "out",)]
    }
    assert len(found) == 1 and json.loads(found.pop())["tokens"] == 8
    refused = python(PROGRAM, tmp_path / "out", *options, "--tokenizer", prepared / "tokenizer.model")
    assert refused.returncode == 2 and "is an exported model and has its own" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "--chat"), "RUN is nowhere: there is no such folder"),
        (("tests",), "one of the arguments --prompt --file --chat --problem is required"),
        (("tests", "--chat", "--prompt", "a"), "not allowed with argument"),
        (("tests", "--prompt", ""), "--prompt is empty"),
        (("tests", "--chat", "--stop", ""), "--stop is empty"),
        (("tests", "--prompt", "\udcff"), "it is not UTF-8"),
        (("tests", "--chat", "--field", "a"), "--field needs --file"),
        (("tests", "--file", "nowhere"), "--file is nowhere: there is no such file"),
        (("tests", "--chat", "--temperature", "nan"), "--temperature is nan: it must be between 0 and 100"),
        (("tests", "--chat", "--top-p", "0"), "--top-p is 0.0: it must be above 0 and at most 1"),
        (("tests", "--chat", "--max-tokens", "0"), "--max-tokens is 0: it must be at least 1"),
        (("tests", "--chat", "--batch", "0"), "--batch is 0: it must be at least 1"),
        (("tests", "--chat", "--seed", "-1"), "--seed is -1: it must be at least 0"),
        (("tests", "--chat", "--device", "gpu"), "--device is 'gpu': it must be cpu, cuda or cuda:N"),
        (("tests", "--chat", "--device", "cuda:99"), "--device is cuda:99: this machine has"),
        (("tests", "--chat"), "tests"),  # not a run
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = python(PROGRAM, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("generate.py: error: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("", (), "it has no line"),
        ("a\n\nb\n", (), "line 2 is empty"),
        ('{"p": 1}\n', ("--field", "p"), "line 1 has no text 'p'"),
        ("{\n", ("--field", "p"), "line 1 is not valid JSON"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, content: str, options: tuple[str, ...], said: str) -> None:
    (tmp_path / "prompts").write_text(content)
    done = python(PROGRAM, "tests", "--file", tmp_path / "prompts", *options)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


HIDE = """
import runpy, sys
sys.argv = [{program!r}, *{arguments}]
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
runpy.run_path({program!r}, run_name="__main__")
"""
HEAVY = ("torch", "transformers", "megatron", "deepspeed")


def run_without(hidden: tuple[str, ...], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = HIDE.format(program=program, arguments=arguments, hidden=hidden)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("program", "wrong", "said"),
    [
        ("launch/generate.py", ("tests", "--chat", "--top-p", "2"), "--top-p is 2.0"),
        ("launch/evaluate.py", ("tests", "--samples", "0"), "--samples is 0"),
        ("launch/evaluate.py", ("tests",), "tests is not a run"),
    ],
)
def test_help_and_mistakes_need_neither_torch_nor_transformers(program: str, wrong: tuple, said: str) -> None:
    assert run_without(HEAVY, program, "--help").stdout.startswith(f"usage: {Path(program).name}")
    assert said in run_without(HEAVY, program, *wrong).stderr


def test_without_transformers_a_line_says_what_to_install(finished: Path) -> None:
    done = run_without(("transformers",), PROGRAM, str(finished), "--chat")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("generate.py: error: transformers is not installed: pip install 'coe-megatron[hf]'")
