"""launch/evaluate.py on a tiny run: losses equal those of training, in any layout; answers; mistakes in one line."""

import json
import math
from pathlib import Path

import pytest
from programs import python, torchrun

from coe_megatron.cli import language_model
from coe_megatron.cli.evaluate import make_parser, report
from coe_megatron.convert.answers import builtin_questions, final_answer
from coe_megatron.convert.generation import Completion
from coe_megatron.convert.load import load
from coe_megatron.data.manifest import Manifest
from coe_megatron.data.records import Templates
from coe_megatron.data.tokenizer import Tokenizer
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.run.metrics_log import read_metrics

PROGRAM = "launch/evaluate.py"
pytestmark = pytest.mark.run


def last_metrics(run: Path) -> dict:
    return [line for line in read_metrics(run / "metrics.jsonl") if "valid_loss" in line][-1]


def evaluate(*arguments: object, ranks: int = 1) -> dict:
    done = python(PROGRAM, *arguments, "--json") if ranks == 1 else torchrun(PROGRAM, *arguments, "--json", ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LAYOUTS = {
    "1 rank": (1,),
    "EP 2": (2, "parallel.expert=2"),
    "PP 2": (2, "parallel.pipeline=2"),
    "TP 2": (2, "parallel.tensor=2"),
    "CP 2": (2, "parallel.context=2"),
    "2 replicas": (2,),
}
FEW = ("1 rank", "EP 2", "PP 2")


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in LAYOUTS]
)
def test_the_loss_is_that_of_training_in_any_layout(finished: Path, layout: str) -> None:
    ranks, *overrides = LAYOUTS[layout]
    found, expected = evaluate(finished, *overrides, ranks=ranks), last_metrics(finished)
    assert found["step"] == expected["step"] == 12
    (values,) = found["sets"].values()
    assert values["loss"] == pytest.approx(expected["valid_loss"], abs=1e-6)
    assert values["bits_per_byte"] == pytest.approx(expected["valid_bits_per_byte"], abs=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert 8 <= values["tokens"] <= 8 * 32  # validation_samples x seq_length


def test_experts_of_later_iterations_can_be_forced_to_be_others_or_the_same(finished: Path) -> None:
    losses = [
        next(iter(evaluate(finished, *changes)["sets"].values()))["loss"]
        for changes in ((), ("chain.no_return=true",), ("chain.gating=fixed",))
    ]
    assert len(set(losses)) == 3 and max(losses) - min(losses) < 1.0


def test_an_earlier_checkpoint_and_a_bf16_run_in_packed_samples(config: Path, prepared: Path, tmp_path: Path) -> None:
    """In bf16 the weights of the forward pass are saved beside the fp32 masters."""
    run = tmp_path / "bf16"
    settings = ("training.precision=bf16", "data.samples=packed", "data.reset_at_documents=true", "parallel.expert=1")
    done = python(
        "launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={run}", *settings,
        "training.steps=3", "training.evaluate_every=1", "training.save_every=1",
        f"data.validation={{own: {prepared}, same: {prepared}}}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logged = {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}
    for checkpoint, step in ((run, 3), (run / "checkpoints" / "step-00000002", 2)):
        found = evaluate(checkpoint)
        assert found["step"] == step and set(found["sets"]) == {"own", "same", "all together"}
        assert found["sets"]["own"]["loss"] == pytest.approx(logged[step]["valid"]["own"]["loss"], abs=1e-5)
        assert found["sets"]["all together"]["loss"] == pytest.approx(logged[step]["valid_loss"], abs=1e-5)
    assert not [path for path in run.iterdir() if path.name.startswith("evaluate")]


def test_files_are_made_into_documents_as_in_preparation(finished: Path, prepared: Path, tmp_path: Path) -> None:
    """A loss per document by the exported model, which shares no code with the data path of training."""
    documents = ["query : 2 plus 2? response : The answer is 4.", "query : \u65e5\u672c? response : The answer is 5."]
    (tmp_path / "plain.txt").write_text("\n\n".join(documents))
    records = [dict(zip(("query", "response"), text[8:].split(" response : "), strict=True)) for text in documents]
    (tmp_path / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + "{}\n")
    files = (tmp_path / "plain.txt", f"named={tmp_path / 'records.jsonl'}")
    refused = python(PROGRAM, finished, "--data", *files)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "records.jsonl, line 3: field 'query' is missing" in refused.stderr
    found = evaluate(finished, "--data", *files, "--skip-malformed")["sets"]
    assert found["plain"] == found["named"] and set(found) == {"plain", "named", "all together"}

    model, _ = load(finished)
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    import torch

    nats = tokens = 0
    for document in documents:
        ids = torch.tensor([[*tokenizer.encode(document).tolist(), tokenizer.eos_id][:33]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert found["plain"]["tokens"] == tokens
    assert found["plain"]["loss"] == pytest.approx(nats / tokens, abs=2e-5)


def test_both_splits_of_prepared_data(finished: Path, prepared: Path) -> None:
    names = (f"train={prepared}:train", f"valid={prepared}", "parallel.expert=1")
    found = evaluate(finished, "--data", *names, "--samples", 8, "--micro-batch", 3)
    assert found["sets"]["valid"]["loss"] == pytest.approx(last_metrics(finished)["valid_loss"], abs=1e-5)
    assert found["sets"]["train"]["loss"] != pytest.approx(found["sets"]["valid"]["loss"], abs=1e-3)
    summary = Manifest.read(prepared).splits["train"]
    per_token = found["sets"]["train"]["loss"] / math.log(2) / summary.bytes_per_token
    assert found["sets"]["train"]["bits_per_byte"] == pytest.approx(per_token)


def test_the_accuracy_of_answers(finished: Path, tmp_path: Path) -> None:
    found = evaluate(finished, "--answers", "builtin", "--problems", 5, "--seed", 3, "--show", 2)["answers"]
    assert (found["problems"], len(found["shown"])) == (5, 2) and found["low"] <= found["accuracy"] <= found["high"]
    questions = list(builtin_questions(5, 3, Templates.of(["{text}"])))
    assert [each["question"] for each in found["shown"]] == [each.query for each in questions[:2]]
    for each in found["shown"]:
        assert each["right"] == (final_answer(each["text"]) == each["answer"])


def test_right_answers_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path) -> None:
    """Of a model that is right on even numbers; its prompt never has the answer."""
    lines = ({"q": f"What is {n}?", "a": f"It is {n}.\n#### {n:,}.0"} for n in range(1000, 1007))
    (tmp_path / "problems.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def answer(_model, _tokenizer, prompts, _sampling) -> list[Completion]:
        numbers = [int(prompt.removeprefix("Q: What is ").removesuffix("?\nA:")) for prompt in prompts]
        texts = [f" The answer is ${n + n % 2}. query : The answer is {n}." for n in numbers]
        return [Completion(*each, 1, "eos") for each in zip(prompts, texts, strict=True)]

    monkeypatch.setattr("coe_megatron.convert.generation.generate", answer)
    monkeypatch.setattr(language_model, "open_model", lambda options: (None, None, None))
    options = ["tests", "--answers", str(tmp_path / "problems.jsonl"), "--template", "Q: {q}\nA: {a}", "--batch", "3"]
    report(make_parser().parse_args([*options, "--show", "1", "--json"]), DistributedEnv())
    found = json.loads(capsys.readouterr().out)["answers"]
    assert (found["right"], found["problems"], found["accuracy"]) == (4, 7, 4 / 7)
    assert found["shown"][0]["right"] and found["shown"][0]["answer"] == "1000"
    report(make_parser().parse_args([*options, "--problems", "2"]), DistributedEnv())
    assert capsys.readouterr().out == "accuracy 0.500 (1 of 2; 95 % interval 0.095 to 0.905)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "RUN is nowhere: there is no such folder"),
        (("tests",), "tests is not a run and not a checkpoint in one: there is no config.yaml"),
        (("tests", "chain.gating=independent"), "chain.gating=independent is not among the settings"),
        (("tests", "model.hidden_size=8"), "model.hidden_size=8 is not among the settings"),
        (("tests", "--samples", "0"), "--samples is 0: it must be between 1 and"),
        (("tests", "--problems", "3"), "--problems needs --answers"),
        (("tests", "--show", "3"), "--show needs --answers"),
        (("tests", "--answers", "nowhere"), "--answers is nowhere: there is no such file"),
        (("tests", "--template", "no field"), "template 'no field' names no field"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = python(PROGRAM, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("evaluate.py: error: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("parallel.expert=3",), "parallel.expert is 3: it must divide moe.num_experts (8)"),
        (("parallel.expert=2",), "must be a multiple of 2"),
        (("--data", "nowhere"), "--data is nowhere: there is no such file or folder"),
        (("--data", "{data}", "{data}"), "--data has two sets with the name builtin"),
        (("--data", "{data}/manifest.json"), "has an unknown format"),
        (("--data", "{data}/manifest.json:train"), "only prepared folders have a train split"),
        (("--data", "tests"), "tests"),
    ],
)
def test_a_mistake_about_a_run_is_one_line(
    finished: Path, prepared: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = python(PROGRAM, finished, *(each.format(data=prepared) for each in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_data_of_another_tokenizer_are_refused(finished: Path, tmp_path: Path) -> None:
    done = python("launch/prepare_data.py", "--builtin", 60, "--vocab-size", 500, "--output", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    done = python(PROGRAM, finished, "--data", tmp_path / "other")
    assert done.returncode == 2 and "has another tokenizer than" in done.stderr and done.stderr.count("\n") == 1
