"""examples/lm_eval: its tasks ask as in training and extract the same answers; lm-eval itself runs on an export."""

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jinja2
import pytest
import yaml
from programs import ROOT, python

from coe_megatron.convert.answers import builtin_questions, file_questions, final_answer
from coe_megatron.convert.generation import Sampling, generate
from coe_megatron.convert.load import load
from coe_megatron.corpus.word_problems import generate as problems
from coe_megatron.data.records import Templates

FOLDER = ROOT / "examples" / "lm_eval"
GSM8K = Templates.of(["query : {question} response : {answer}"])


def task(name: str) -> dict:
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return {**(yaml.safe_load((FOLDER / found.pop("include")).read_text()) if "include" in found else {}), **found}


def rendered(text: str, record: dict) -> str:
    return jinja2.Template(text).render(**record)


def extracted(text: str, of: dict) -> str:
    """As lm-eval's filter `regex` does, and its metric with what it ignores."""
    pattern = of["filter_list"][0]["filter"][0]["regex_pattern"]
    return normal((re.findall(pattern, text) or [""])[0], of)


def normal(answer: str, of: dict) -> str:
    for ignored in of["metric_list"][0]["regexes_to_ignore"]:
        answer = re.sub(ignored, "", answer)
    return answer


def test_built_in_problems_are_asked_and_judged_as_by_the_project() -> None:
    of = task("coe_word_problems")
    asked = builtin_questions(200, 1, Templates.of(["{text}"]))
    for question, problem in zip(asked, problems("valid", 200, 1), strict=True):
        assert rendered(of["doc_to_text"], problem) == question.prompt
        target = normal(rendered(of["doc_to_target"], problem), of)
        assert extracted(problem["response"], of) == target and final_answer(f"#### {target}") == question.answer


def test_gsm8k_is_asked_and_judged_as_by_the_project(real_text: Path) -> None:
    of, path = task("coe_gsm8k"), real_text / "gsm8k_valid.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for question, record in zip(file_questions(path, GSM8K), records, strict=True):
        assert rendered(of["doc_to_text"], record) == question.prompt
        target = normal(rendered(of["doc_to_target"], record), of)
        assert extracted(record["answer"], of) == target and Fraction(target) == Fraction(question.answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### $1,200.00", "1200"),
        ("The answer is -3.5.", "-3.5"),
        ("the answer is: 7 cm. #### 8", "7"),
        ("It is 7.", ""),
    ],
)
def test_answers_of_a_model_are_extracted(text: str, answer: str) -> None:
    assert extracted(text, task("coe_word_problems")) == answer


@pytest.mark.run
@pytest.mark.slow
def test_lm_eval_runs_on_an_export_without_a_network(finished: Path, tmp_path: Path) -> None:
    done = python("launch/checkpoint.py", "export", finished, tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    records = [{"query": f"{n} + 1?", "response": f"It is {n + 1}. The answer is {n + 1}."} for n in range(5)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "word_problems.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += ["pretrained=exported,trust_remote_code=True", "--tasks", "coe_word_problems"]
    command += ["--include_path", FOLDER, "--device", "cpu", "--batch_size", "2", "--limit", "3"]
    command += ["--gen_kwargs", "max_gen_toks=8", "--log_samples", "--output_path", "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr

    (path,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    prompts = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
    assert prompts == [f"query : {n} + 1? response :" for n in range(3)]
    ours = generate(*load(tmp_path / "exported"), prompts, Sampling(max_tokens=8, stop=("query :",)))
    assert [sample["resps"][0][0] for sample in samples] == [each.text for each in ours]
    assert [sample["target"] for sample in samples] == ["1", "2", "3"]
