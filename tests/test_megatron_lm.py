"""The chain in Megatron-LM's own programs: its arguments, its spec, and starting a program with them."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_build import make_config

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.errors import ConfigError
from coe_megatron.megatron_lm import SPEC, add_coe_arguments, chain_settings, coe_spec, main
from coe_megatron.model import CoELayer

ROOT = Path(__file__).parents[1]


def parse(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--spec", nargs="*")
    return add_coe_arguments(parser).parse_args(text.split())


def test_every_setting_of_the_chain_is_an_argument() -> None:
    names = {field.name for field in fields(ChainSettings)} | {
        "recompute",
        "deduplicated",
        "overlap_chunks",
        "megatron_losses",
    }
    assert {name.removeprefix("coe_") for name in vars(parse("")) if name != "spec"} == names
    assert chain_settings(parse("")) == ChainSettings()


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("--coe-iterations 3 --coe-gating fixed", ChainSettings(iterations=3, gating="fixed")),
        ("--coe-residual init", ChainSettings(residual="init")),
        ("--coe-norm-placement reference", ChainSettings(norm_placement="reference")),
        ("--coe-aux-loss-reduction mean", ChainSettings(aux_loss_reduction="mean")),
        ("--coe-learned-scale 0.5", ChainSettings(learned_scale=0.5)),
        ("--coe-conditioned --coe-no-return", ChainSettings(conditioned=True, no_return=True)),
        ("--coe-layers 1 3", ChainSettings(layers=(1, 3))),
    ],
)
def test_arguments_become_settings(text: str, chain: ChainSettings) -> None:
    assert chain_settings(parse(text)) == chain


def test_any_option_of_the_chain_selects_the_spec() -> None:
    assert parse("").spec is None
    assert parse("--coe-iterations 1").spec == SPEC
    assert parse("--coe-no-return").spec == SPEC
    assert parse("--coe-megatron-losses").spec == SPEC and parse("--coe-megatron-losses").coe_megatron_losses
    assert parse("--spec other function --coe-no-return").spec == ["other", "function"]


@pytest.mark.parametrize("text", ["--coe-gating some", "--coe-iterations two", "--coe-layers"])
def test_a_wrong_value_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(text)
    assert text.split()[0] in capsys.readouterr().err


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^chain\.iterations is 0"):
        chain_settings(parse("--coe-iterations 0"))


@pytest.fixture
def arguments(single_rank: None) -> Iterator[argparse.Namespace]:
    """Megatron's parsed arguments, as a program would have set them."""
    variables = pytest.importorskip("megatron.training.global_vars", reason="0.16.1 has no megatron.training")
    namespace = argparse.Namespace()
    variables.set_args(namespace)
    yield namespace
    variables.unset_global_variables()


def spec(arguments: argparse.Namespace, text: str = "", **changes: Any) -> Any:
    vars(arguments).update(vars(parse(text)))
    config = make_config(num_layers=2, **{"transformer_impl": "local", **changes})
    return coe_spec(SimpleNamespace(transformer=config))


def test_the_spec_has_the_chain_of_the_arguments(arguments: argparse.Namespace) -> None:
    layers = spec(arguments, "--coe-iterations 3 --coe-recompute layer").layer_specs
    assert [layer.submodules.mlp.func for layer in layers] == [CoELayer] * 2
    given = layers[0].submodules.mlp.keywords
    assert (given["chain"], given["recompute"]) == (ChainSettings(iterations=3), "layer")


def test_without_arguments_the_chain_is_the_papers(arguments: argparse.Namespace) -> None:
    config = make_config(num_layers=2, transformer_impl="local")
    layers = coe_spec(SimpleNamespace(transformer=config)).layer_specs
    assert layers[1].submodules.mlp.keywords["chain"] == ChainSettings()


def test_some_layers_can_be_chains(arguments: argparse.Namespace) -> None:
    layers = spec(arguments, "--coe-layers 2").layer_specs
    assert [layer.submodules.mlp.keywords["chain"].iterations for layer in layers] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_experts": None}, "--num-experts is missing"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers is given"),
        ({"transformer_impl": "inference_optimized"}, "--transformer-impl is inference_optimized"),
        ({"qk_l2_norm": True}, "qk_l2_norm is True"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: argparse.Namespace, changes: dict[str, Any], message: str) -> None:
    config = make_config(num_layers=2, transformer_impl="local")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=f"^{message}"):
        coe_spec(SimpleNamespace(transformer=config))


PROGRAM = """
import argparse, sys
from pathlib import Path
from megatron.training.arguments import parse_args
import beside
arguments = parse_args()
print(arguments.spec, arguments.coe_iterations, arguments.num_layers, sys.argv[0] == __file__, __name__)
if arguments.coe_iterations == 7:
    from coe_megatron.errors import ConfigError
    raise ConfigError("seven")
"""


@pytest.mark.run
def test_a_program_is_started_with_the_arguments(tmp_path: Path) -> None:
    pytest.importorskip("megatron.training", reason="0.16.1 has no megatron.training")
    program = tmp_path / "pretrain.py"
    program.write_text(PROGRAM)
    (tmp_path / "beside.py").touch()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "coe_megatron.megatron_lm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run(str(program), "--num-layers", "3", "--coe-iterations", "4")
    assert done.stdout.splitlines()[-1] == f"{SPEC} 4 3 True __main__", done.stderr
    wrong = run(str(program), "--coe-iterations", "7")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1] == "pretrain.py: error: seven"
    assert run().returncode == 1


def test_without_megatrons_loop_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("megatron_lm: error: Megatron-Core is ")
