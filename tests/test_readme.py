"""What the README shows works as it stands there."""

import math
import re
from pathlib import Path

import pytest
import torch
from programs import python, torchrun

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("single_rank")
def test_the_megatron_example_builds_a_chain_that_learns() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    model = names["model"]
    assert [len(layer.mlp.routers) for layer in model.decoder.layers] == [2, 2]
    tokens, positions = torch.randint(512, (2, 16)), torch.arange(16).expand(2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, positions, None, labels=tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.run
@pytest.mark.parametrize("layout", ["", "--expert 2", "--pipeline 2"])
def test_the_example_in_megatron_learns(layout: str) -> None:
    command = f"examples/chain_in_megatron.py {layout}".strip()
    assert command in README
    done = torchrun(*command.split()) if layout else python(command)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[0] == pytest.approx(math.log(512), abs=0.5) and losses[-1] < 0.5


def test_every_file_the_readme_names_is_there() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"(?:launch|configs)/[\w./-]+\w", README):
        assert (ROOT / name).exists(), name


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)\b  +#", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
