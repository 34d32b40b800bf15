"""Valid configs changed at random: what is accepted can be costed, dumped and built; the rest gets a line with a name.

Values are drawn from the type hints of the settings, so that a new setting is covered by being there.
"""

import copy
import json
import math
import types
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from coe_megatron.config import RunConfig, dump, load
from coe_megatron.config.load import resolve
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.study.plan.arms import override

pytestmark = pytest.mark.thorough

CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml") if "studies" not in path.parts
)
FIXED = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
INTEGERS = st.sampled_from([*range(-1, 9), 12, 16, 24, 32, 48, 64, 100, 512, 10_000, 2**31, 10**24])
FLOATS = st.sampled_from([0.0, 1e-300, 1e-6, 0.1, 0.5, 1.0, 2.5, 40.0, 1e30, -1.0, math.inf, math.nan])
TEXTS = st.sampled_from(["", "a", "runs/x", "many", "1k", "1e-3", "none", "a\nb", "${moe.topk}", "${x.y}", "${", "???"])
ANYTHING = st.one_of(
    st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS, st.lists(INTEGERS, max_size=3), st.just({}), st.just({"a": 1})
)
Mutation = tuple[tuple[str, ...], Any]
DELETE = object()


def values_of(hint: Any) -> st.SearchStrategy:
    """Values of a type hint as YAML has them; not all are valid."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return values_of(inner[0])
    if kind is Literal:
        return st.sampled_from(inner)
    if kind in (Union, types.UnionType):
        return st.one_of(*map(values_of, inner))
    if kind is list or ... in inner:
        return st.lists(values_of(inner[0]), max_size=4)
    if kind is tuple:
        return st.tuples(*map(values_of, inner)).map(list)
    if kind is dict:
        return st.dictionaries(TEXTS, values_of(inner[1]), max_size=2)
    if is_dataclass(hint):
        fields = {name: values_of(part) for name, part in get_type_hints(hint, include_extras=True).items()}
        return st.fixed_dictionaries({}, optional=fields)
    return {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: TEXTS, type(None): st.none()}[hint]


def settings_of(cls: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every section and setting with its hint."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        yield (*path, name), hint
        for part in (hint, *get_args(hint)):
            if isinstance(part, type) and is_dataclass(part):
                yield from settings_of(part, (*path, name))


EVERY = dict(settings_of(RunConfig))
NAMES = {".".join(path) for path in EVERY}


@st.composite
def mutations(draw: st.DrawFn, prefixes: tuple[str, ...] = ()) -> Mutation:
    """One change: a value of the setting's type (mostly), any value, nothing at all, or a key that is none."""
    path = draw(st.sampled_from([path for path in EVERY if not prefixes or path[0] in prefixes]))
    what = draw(st.sampled_from(["typed"] * 5 + ["any", "delete", "unknown"]))
    if what == "unknown":
        return (*path[:-1], draw(st.sampled_from(["topkk", "lr_", "x", "Model", "hidden-size", 3, ""]))), draw(ANYTHING)
    return path, {"typed": draw(values_of(EVERY[path])), "any": draw(ANYTHING), "delete": DELETE}[what]


SMALL = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64])
TOGETHER = st.fixed_dictionaries(
    {},
    optional={
        ("moe", "topk"): SMALL,
        ("moe", "num_experts"): SMALL,
        ("moe", "num_groups"): SMALL,
        ("moe", "group_topk"): SMALL,
        ("model", "num_attention_heads"): SMALL,
        ("model", "num_query_groups"): SMALL,
        ("model", "num_layers"): SMALL,
        ("training", "global_batch"): SMALL,
        ("training", "micro_batch"): SMALL,
        ("parallel", "expert"): SMALL,
        ("parallel", "world_size"): SMALL,
    },
).map(lambda changes: list(changes.items()))


def mutated(values: dict[str, Any], changes: list[Mutation]) -> dict[str, Any]:
    """The values with the changes; one into a section that is none any more is left out."""
    values = copy.deepcopy(values)
    for (*sections, name), value in changes:
        section: Any = values
        for part in sections:
            if isinstance(section, dict):
                section = section.setdefault(part, {})
        if not isinstance(section, dict):
            continue
        if value is DELETE:
            section.pop(name, None)
        else:
            section[name] = value
    return values


def plain(config: RunConfig) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.create(dump(config)))


@pytest.fixture(scope="module")
def valid() -> list[dict[str, Any]]:
    """Every config of the project, and the defaults."""
    sized = {"model": {"vocab_size": 512}}
    return [sized, *(mutated(plain(load(path)), [(("model", "vocab_size"), 512)]) for path in CONFIGS)]


@pytest.mark.slow
@given(data=st.data())
@settings(FIXED, max_examples=200)
def test_a_changed_config_is_costed_or_refused_in_one_line(
    data: st.DataObject, valid: list[dict[str, Any]], tmp_path: Path
) -> None:
    start = data.draw(st.sampled_from(range(len(valid))))
    changes = data.draw(st.one_of(st.lists(mutations(), min_size=1, max_size=3), TOGETHER))
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(mutated(valid[start], changes)))
    try:
        config = load(path)
        cost = estimate(resolved(config, vocabulary(config)))
    except ValueError as error:
        said = str(error)
        assert said.isprintable(), said
        unknown = {repr(path[-1]) for path, _ in changes} | {str(path[-1]) for path, _ in changes}
        assert isinstance(error, ConfigError) or said.startswith(tuple(NAMES)), said
        assert any(name in said for name in NAMES | unknown), said
        return
    assert all(math.isfinite(number) and number >= 0 for number in numbers(cost.as_dict()))
    assert cost.parameters.total >= cost.parameters.active > 0 and cost.flops_per_token.total > 0
    assert sum(cost.memory.values()) > 0 and cost.tokens_per_step > 0
    assert json.loads(json.dumps(cost.as_dict())) and "nan" not in cost.table()
    path.write_text(dump(config))
    assert load(path) == config


ODD = ["0:30", "09:15", "-0:3", "oN", "yEs", "010", "_" * 70, "9" * 70, "1e-3", ".5", ".inf", "null", "~x", "# no"]
ODD += ["a: b", "- a", "[a]", "'", '"', "\\", "x\\n", "é", "\U0001f600", "!!binary", "&a", "*a", "%a", "@a", "`a", "="]
PRINTED = st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"], exclude_characters="\u2028\u2029\x85")
PATHS = st.one_of(st.sampled_from(ODD), st.text(PRINTED, min_size=1)).filter(
    lambda text: "${" not in text and not text.startswith("~") and text != "???"
)


@pytest.mark.slow
@given(text=PATHS, name=PATHS)
@settings(FIXED, max_examples=60, phases=[Phase.explicit, Phase.generate])
def test_any_text_is_the_same_in_the_runs_own_config_and_in_a_studys(text: str, name: str, tmp_path: Path) -> None:
    values = {"output": text, "data": {"path": text, "validation": {name: text}}}
    try:
        config = resolve(OmegaConf.create(values))
    except ConfigError:
        return  # of names of validation sets not all are allowed
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    assert load(path, [override("data.path", text)]) == config


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif value is not None and not isinstance(value, str):  # what is not known, and names
        yield value


SMALL_MODEL = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 64},
    "moe": {"num_experts": 8, "topk": 2, "ffn_hidden_size": 16},
}
BUILT = ("model", "moe", "chain")


@given(data=st.data())
@settings(FIXED, max_examples=100)
@pytest.mark.usefixtures("single_rank")
def test_what_is_accepted_can_be_built_and_has_the_parameters_it_was_said_to_have(
    data: st.DataObject, tmp_path: Path
) -> None:
    from coe_megatron.model.build import build_model

    small = st.one_of(mutations(BUILT), mutations(BUILT).filter(lambda change: change[0][:2] == ("model", "mla")))
    changes = data.draw(st.one_of(st.lists(small, min_size=1, max_size=4), TOGETHER))
    sized = [(("parallel",), {}), (("training",), {}), (("model", "vocab_size"), 64)]
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(mutated(SMALL_MODEL, [*changes, *sized])))
    try:
        config = load(path)
    except ConfigError:
        return
    counted = estimate(RunShape.of(config, 64, 1)).parameters.total
    if counted > 3_000_000 or config.model.num_layers > 8 or config.chain.iterations > 8:
        return
    assert sum(parameter.numel() for parameter in build_model(config, 64).parameters()) == counted, asdict(config)
