"""A run goes out as a Hugging Face model and comes back: the programs, `load`, and training that goes on the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from programs import python, torchrun

import coe_megatron
from coe_megatron.errors import ConfigError
from coe_megatron.run.metrics_log import read_metrics

PROGRAM = "launch/checkpoint.py"
pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    """An export of the run, made by the program; it trained on two ranks with experts on either."""
    out = finished.parent / "exported"
    done = python(PROGRAM, "export", finished, out, "--shard-gb", "0.001")
    assert done.returncode == 0 and done.stdout == f"written: {out}\n", done.stderr
    assert "transformers has no architecture for it: it iterates 2 times" in done.stderr
    return out


def test_what_an_export_holds(exported: Path, finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {path.name for path in exported.iterdir()}
    assert names >= {"config.json", "generation_config.json", "README.md", "tokenizer.json", "modeling_coe.py"}
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {
        (exported / "config.json").stat().st_mode & 0o777
    }
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {name for name in names if name.endswith(".safetensors")}
    card = (exported / "README.md").read_text()
    loss = read_metrics(finished / "metrics.jsonl")[-1]["valid_loss"]
    assert f"| valid loss | {loss:.4f} |" in card and "# CoE-2(2/8)+1, 2 layers" in card

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((finished / "run.json").read_text())["parameters"]["total"]
    )
    mine, its_tokenizer = coe_megatron.load(finished)
    inputs = tokenizer("Tom has 3 apples.", return_tensors="pt")
    assert inputs.input_ids.tolist() == its_tokenizer("Tom has 3 apples.", return_tensors="pt").input_ids.tolist()
    torch.testing.assert_close(model.eval()(**inputs).logits, mine(**inputs).logits)
    again, _ = coe_megatron.load(exported, dtype="bfloat16")
    assert again.dtype == torch.bfloat16


def test_training_goes_on_from_an_import_as_from_the_run(
    exported: Path, finished: Path, config: Path, prepared: Path
) -> None:
    out = finished.parent / "imported"
    done = python(PROGRAM, "import", exported, out)
    assert done.returncode == 0 and done.stdout == f"written: {out}\n", done.stderr
    losses = []
    for source in (finished, out):
        run = finished.parent / f"on from {source.name}"
        settings = (f"data.path={prepared}", f"output={run}", f"training.warm_start={source}", "training.steps=4")
        done = torchrun("launch/pretrain_coe.py", config, *settings)
        assert done.returncode == 0, done.stderr
        losses.append(
            [
                (line["step"], line.get("train_loss"), line.get("valid_loss"))
                for line in read_metrics(run / "metrics.jsonl")
            ]
        )
    assert losses[0] == losses[1] and len(losses[0]) >= 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("export", "RUN", "RUN"), "exists: name another folder, or give --overwrite"),
        (("export", "RUN", "OUT", "--shard-gb", "0"), "--shard-gb is 0.0: it must be between 0.001 and 1000"),
        (("export", "RUN", "OUT", "--tokenizer", "nowhere"), "--tokenizer is nowhere: there is no such file"),
        (("export", "RUN", "OUT", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("export", "DATA", "OUT"), "holds no checkpoint"),
        (("import", "RUN", "OUT"), "config.json"),
        (("import", "nowhere", "OUT"), "DIR is nowhere: there is no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], line: str, finished: Path, prepared: Path, tmp_path: Path
) -> None:
    places = {"RUN": finished, "DATA": prepared, "OUT": tmp_path / "out"}
    done = python(PROGRAM, *(places.get(each, each) for each in arguments))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_load_says_what_is_wrong(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        coe_megatron.load(finished, dtype="int8")
    lost = tmp_path / "lost"
    shutil.copytree(finished, lost)
    (lost / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"there is no config\.yaml"):
        coe_megatron.load(lost)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'coe-megatron\[hf\]'"):
        coe_megatron.load(finished)
