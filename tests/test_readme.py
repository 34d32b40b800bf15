"""What the README shows works as it stands there."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from programs import python, torchrun

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# What follows the Megatron example, in the same process.
_TRAIN = """
import json
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(10):
    loss = model(tokens, positions, None, labels=tokens).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps({"routers": [len(layer.mlp.routers) for layer in model.decoder.layers], "losses": losses}))
"""


@pytest.mark.run
def test_the_megatron_example_runs_as_pasted_and_builds_a_chain_that_learns(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = tmp_path / "pasted.py"
    program.write_text(code + _TRAIN)
    done = python(program, fresh=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["routers"] == [2, 2]
    assert said["losses"][-1] < said["losses"][0] - 0.5


@pytest.mark.run
def test_the_commands_for_ones_own_text_train_and_cut_no_document(tmp_path: Path) -> None:
    (prepare,) = re.findall(r"^python (launch/prepare_data.py .*)$", README, re.MULTILINE)
    (train,) = re.findall(r"^python (launch/one_host.py (?:.*\\\n)*.*)$", README, re.MULTILINE)
    pick = random.Random(0)
    words = ["".join(pick.choices("abcdefghijklmnop", k=5)) for _ in range(500)]
    for name in ("train", "valid"):  # longer than the quickstart's 128 tokens
        lines = [json.dumps({"text": " ".join(pick.choices(words, k=200))}) for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        prepare = prepare.replace(f"{name}.jsonl", str(tmp_path / f"{name}.jsonl"))
    prepared, run = tmp_path / "data", tmp_path / "run"
    words = prepare.replace("data/mine", str(prepared)).replace("16000", "400").split()
    done = python(*words, fresh=True)
    assert done.returncode == 0, done.stderr
    words = train.replace("\\\n", " ").replace("data/mine", str(prepared)).replace("runs/mine", str(run)).split()
    done = python(*words, "training.steps=1", "model.num_layers=1", seconds=280, fresh=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text())["truncated_fraction"] == 0


@pytest.mark.run
@pytest.mark.parametrize(
    "layout", ["", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("--expert 2", "--pipeline 2"))]
)
def test_the_example_in_megatron_learns(layout: str) -> None:
    command = f"examples/chain_in_megatron.py {layout}".strip()
    assert command in README
    words = command.split()
    done = torchrun(*words, fresh=True) if layout else python(*words, fresh=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[0] == pytest.approx(math.log(512), abs=0.5) and losses[-1] < 0.5


def test_the_readme_is_short() -> None:
    by_make_gpu = re.findall(r"^\| .*\bGPU tests\]", README, re.MULTILINE)
    assert len(README.splitlines()) - len(by_make_gpu) <= 150


def test_every_file_the_readme_names_is_there() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"(?:launch|configs)/[\w./-]+\w", README):
        assert (ROOT / name).exists(), name


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)\b  +#", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
