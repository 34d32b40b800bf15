"""Study files: mistakes are one line that names the key; axes cross and zip; every arm has a name and a config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coe_megatron.config import load
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan import arms
from coe_megatron.study.plan.arms import Study, make_study, override
from coe_megatron.study.plan.study_file import read_study

Write = Callable[..., Path]
NORM_PLACEMENTS = {"chain.norm_placement": ["prenorm", "iteration_norm"]}


def make(path: Path, *overrides: str) -> Study:
    return make_study(read_study(path), overrides)


def test_axes_are_crossed_and_what_is_skipped_is_no_arm(study_file: Write) -> None:
    study = make(study_file())
    assert [arm.name for arm in study.arms] == [
        "moe-4-8_prenorm",
        "coe-2-2-8_prenorm",
        "coe-2-2-8_iteration-norm",
    ]
    assert study.skipped == [({"design": "MoE(4/8)", "norm_placement": "iteration_norm"}, "at C = 1 it is prenorm")]
    chosen = [(arm.config.chain.iterations, arm.config.moe.topk, arm.config.chain.norm_placement) for arm in study.arms]
    assert chosen == [(1, 4, "prenorm"), (2, 2, "prenorm"), (2, 2, "iteration_norm")]
    assert study.baseline is study.arms[0]
    assert {arm.config.model.hidden_size for arm in study.arms} == {32}, "the base holds where nothing else is said"


def test_lists_of_one_axis_belong_together(study_file: Write) -> None:
    axis = {"chain.iterations": [1, 2], "moe.topk": [4, 2]}
    study = make(study_file(axes={"design": axis}, skip=None, baseline={"design": "1, 4"}))
    assert [(arm.name, arm.config.moe.topk) for arm in study.arms] == [("1-4", 4), ("2-2", 2)]


def test_labels_may_be_numbers_and_values_may_be_lists(study_file: Write) -> None:
    axes = {"experts": {"moe.num_experts": [8, 16]}, "layers": {"moe.layer_freq": [1, [0, 1]]}}
    study = make(study_file(axes=axes, skip=None, baseline={"experts": 8, "layers": 1}))
    assert [arm.name for arm in study.arms] == ["8_1", "8_0-1", "16_1", "16_0-1"]
    assert study.arms[3].config.moe.layer_freq == [0, 1]


def test_every_run_has_a_folder_a_seed_and_overrides_that_repeat_it(study_file: Write) -> None:
    path = study_file(set={"data.path": "a: b", "optimizer.lr": 2e-5})
    study = make(path, "training.log_every=7")
    assert [run.config.output for run in study.runs[:3]] == [
        "runs/small/moe-4-8_prenorm/seed-1",
        "runs/small/moe-4-8_prenorm/seed-2",
        "runs/small/coe-2-2-8_prenorm/seed-1",
    ]
    assert len({run.config.output for run in study.runs}) == len(study.runs) == 6
    for run in study.runs:
        assert load(path.parent / "base.yaml", run.overrides) == run.config
        assert (run.config.training.seed, run.config.training.log_every) == (run.seed, 7)
        assert (run.config.data.path, run.config.optimizer.lr) == ("a: b", 2e-5)


def test_each_seed_can_start_from_its_own_weights(study_file: Write) -> None:
    """In the config of a run and in the overrides that repeat it."""
    study = make(study_file(), "training.warm_start=starts/{seed}/chain-{seed}")
    assert study.arms[0].config.training.warm_start == "starts/{seed}/chain-{seed}"
    for run in study.runs:
        assert run.config.training.warm_start == f"starts/{run.seed}/chain-{run.seed}"
        assert run.overrides[-1] == f"training.warm_start={run.config.training.warm_start}"


def test_the_fingerprint_tells_settings_apart_and_neither_seed_nor_folder(study_file: Write) -> None:
    before, moved, other = (
        make(study_file(**changes))
        for changes in ({}, {"output": "runs/x", "seeds": [5]}, {"set": {"optimizer.lr": 1e-5}})
    )
    prints = [[arm.fingerprint for arm in study.arms] for study in (before, moved, other)]
    assert prints[0] == prints[1]
    assert len({*prints[0], *prints[2]}) == 6


def test_a_study_of_other_sizes_takes_its_axes_from_another_file(study_file: Write) -> None:
    folder = study_file(set={"optimizer.lr": 1e-5}).parent / "sub"
    folder.mkdir()
    (folder / "wide.yaml").write_text("model: {hidden_size: 64}\n")
    wide = folder / "study.yaml"
    wide.write_text(
        "base_study: ../study.yaml\nbase: [../base.yaml, wide.yaml]\noutput: runs/wide\nset: {moe.scaling: 2}\n"
    )
    study = make(wide)
    assert [arm.name for arm in study.arms] == [arm.name for arm in make(folder.parent / "study.yaml").arms]
    for arm in study.arms:
        assert arm.config.output.startswith("runs/wide/")
        assert (arm.config.model.hidden_size, arm.config.optimizer.lr, arm.config.moe.scaling) == (64, 1e-5, 2.0)


@pytest.mark.parametrize(
    "value",
    [
        "plain/text",
        "a: b",
        "",
        "1",
        "null",
        "1e-3",
        "[a]",
        "[",
        "{",
        "'",
        "@x",
        3,
        0.5,
        1e-7,
        True,
        None,
        [1, 2],
        {"a": "b"},
    ],
)
def test_an_override_is_read_as_the_value_it_was_made_of(value: Any, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.from_dotlist([override("key", value)]))
    assert found == {"key": value}


SKIP = {"where": {"design": "MoE(4/8)", "norm_placement": "iteration_norm"}, "reason": "at C = 1 it is prenorm"}
STAND_IN_ITSELF_COMPARED = {"design": "CoE-2(2/8)", "norm_placement": "prenorm"}
DESIGN = {"a": {"moe.topk": 4}, "b": {"moe.topk": 2}}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"axis": {}}, "axis is not a setting; did you mean axes?"),
    ({"axes": {"a": {"n" * 256: {}}}}, "axes.a has a label of 256 bytes"),
    ({"output": None}, "output is missing: a value is required"),
    ({"base": None}, "base is missing"),
    ({"base": 7}, "base is 7: it must name a run config or a list of them"),
    ({"base": "none.yaml"}, "there is no such file"),
    ({"base": "${nothing}"}, "base has no value: Interpolation key 'nothing' not found"),
    ({"base": ["${a}"], "a": "${b}${b}", "b": "${c}${c}"}, "a is a reference itself; refer to the value it names"),
    ({"set": {"moe.ffn_hidden_size": "["}}, "moe.ffn_hidden_size is '[': it should be an integer"),
    ({"base_study": "study.yaml"}, "base_study leads back to this file"),
    ({"seeds": []}, "seeds is []: it should have at least 1 item"),
    ({"seeds": [1, 1]}, "seeds is [1, 1]: seeds must differ"),
    ({"seeds": ["one"]}, "seeds.0 is 'one': it should be an integer ≥ 0"),
    ({"seeds": 3}, "seeds is 3: it should be a list of integers ≥ 0"),
    ({"axes": {}}, "axes is {}: it should have at least 1 item"),
    ({"axes": {"design": 3}}, "axes.design is 3: it should be names with section"),
    ({"axes": {"design": {}}}, "axes.design is empty"),
    ({"axes": {"design": {"moe.topk": 4}}}, "axes.design must map either labels to settings, or settings to lists"),
    ({"axes": {"design": {"a": {"moe.topk": 4}, "moe.topk": [1]}}}, "axes.design must map either labels to settings"),
    ({"axes": {"design": {"moe.topk": []}}}, "axes.design must map either labels to settings"),
    (
        {"axes": {"design": {"moe.topk": [1, 2], "chain.iterations": [1]}}},
        "axes.design: moe.topk has 2, chain.iterations has 1 values: lists of one axis must have the same length",
    ),
    ({"axes": {"design": {"moe.topk": [1, 1]}}}, "axes.design has the same values twice: 1"),
    ({"axes": {"design": {"moe.topk": [1, "1"]}}}, "axes.design has the same values twice: 1"),
    ({"axes": {"design": {" ": {}}}}, "axes.design has the label ' ': a label must have visible text"),
    (
        {"axes": {"design": {"a\nb": {}, "a\\nb": {}}}},
        r"axes.design has the labels 'a\nb' and 'a\\nb': they look the same",
    ),
    ({"axes": {"design": {"a": {}, "a ": {}}}}, "axes.design has the labels 'a' and 'a ': they look the same"),
    ({"axes": {"design": {"é": {}, "e\u0301": {}}}}, r"the labels '\xe9' and 'e\u0301': they look the same"),
    ({"axes": {"design": {True: {}, "true": {}}}}, "axes.design has true twice, as text and as something else"),
    ({"axes": {"design": {"a": {"moe.topk=2,x": 1}}}}, "axes.design has 'moe.topk=2,x': it must be a setting's name"),
    ({"axes": {"design": {"a": {"moe[topk]": 1}}}}, "axes.design has 'moe[topk]': it must be a setting's name"),
    ({"axes": {"x": DESIGN, "y": {"a": {"moe": {"topk": 1}}}}}, "axes.y sets moe.topk: axes.x sets it too"),
    ({"set": {"training": {"seed": 3}}}, "training.seed is set for arms: use the study's key seeds instead"),
    ({"base": ["base.yaml", "base.yaml"]}, "at most 64 files, none twice"),
    ({"axes": {"x": DESIGN, "y": {"moe.topk": [1, 2]}}}, "axes.y sets moe.topk: axes.x sets it too"),
    ({"axes": {"x": {"training.seed": [1, 2]}}}, "training.seed is set for arms: use the study's key seeds instead"),
    ({"set": {"output": "x"}}, "output is set for arms: use the study's key output instead"),
    ({"set": {"moe.topk": 3}}, "moe.topk is set for all arms: axes.design sets it too"),
    ({"set": {"moe.top_k": 3}}, "arm moe-4-8_prenorm: moe.top_k is not a setting; did you mean moe.topk?"),
    ({"set": {"moe.num_experts": 3}}, "arm moe-4-8_prenorm: moe.topk is 4: it must be at most moe.num_experts (3)"),
    ({"axes": {"design": {"a": {}, "b": {}}}, "skip": [], "baseline": {"design": "a"}}, "arms a and b have the same"),
    (
        {"baseline": {"design": "MoE(4/8)"}},
        "baseline of coe-2-2-8_iteration-norm is MoE(4/8) iteration_norm: skip excludes that arm; give that skip a",
    ),
    ({"baseline": {"design": None}}, "baseline names no label: give it a label of at least one axis"),
    ({"skip": [SKIP | {"use": {"norm_placement": "x"}}]}, "skip.0.use.norm_placement is 'x': it must be one of"),
    (
        {"baseline": {"design": "MoE(4/8)"}, "skip": [SKIP | {"use": {"norm_placement": "iteration_norm"}}]},
        "skip uses MoE(4/8) iteration_norm instead of MoE(4/8) iteration_norm: skip excludes that arm too",
    ),
    (
        {"baseline": {"design": "MoE(4/8)"}, "skip": [SKIP | {"use": STAND_IN_ITSELF_COMPARED}]},
        "baseline of coe-2-2-8_iteration-norm is coe-2-2-8_prenorm, which is compared with moe-4-8_prenorm itself",
    ),
    ({"baseline": {"desgin": "x"}}, "baseline.desgin is not an axis; the axes are design, norm_placement"),
    ({"baseline": {"design": "x"}}, "baseline.design is 'x': it must be one of MoE(4/8), CoE-2(2/8)"),
    (
        {"baseline": {"design": "MoE(4/8)", "norm_placement": "iteration_norm"}},
        "baseline is MoE(4/8) iteration_norm: skip excludes that arm",
    ),
    ({"skip": [{"where": {}, "reason": "x"}]}, "skip.0.where is {}: it would skip every arm"),
    ({"skip": [{"where": {"design": "x"}, "reason": "x"}]}, "skip.0.where.design is 'x': it must be one of MoE(4/8)"),
    ({"skip": [{"where": {"designs": "x"}, "reason": "x"}]}, "skip.0.where.designs is not an axis"),
    ({"skip": [{"where": {"norm_placement": ["prenorm"]}}]}, "skip.0.reason is missing"),
    (
        {"skip": [{"where": {"norm_placement": ["prenorm", "iteration_norm"]}, "reason": "x"}]},
        "skip excludes every arm",
    ),
    ({"budget": {"equal": "flop"}}, "budget.equal is 'flop': it should be 'expert_compute', 'flops', 'parameters'"),
    ({"budget": {"equal": "flops", "solve": "training.steps"}}, "budget.range is missing"),
    (
        {"budget": {"equal": "flops", "solve": "training.steps", "range": [9, 1]}},
        "budget.range is [9, 1]: the first number must not be larger",
    ),
    ({"budget": {"equal": "flops", "solve": "training.steps", "range": [0, 1]}}, "budget.range.0 is 0: it should be"),
    (
        {"budget": {"equal": "flops", "solve": "moe.topk", "range": [1, 9]}},
        "budget.solve is moe.topk: axes.design sets it already; solve for another setting",
    ),
    (
        {"budget": {"equal": "flops", "solve": "training.seed", "range": [1, 9]}},
        "budget.solve is training.seed: seeds sets it already",
    ),
    ({"budget": {"equal": "flops", "slove": "x"}}, "budget.slove is not a setting; did you mean budget.solve?"),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(study_file: Write, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(study_file(**changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_stratum_has_its_own_baseline(study_file: Write) -> None:
    skip = SKIP | {"use": {"norm_placement": "prenorm"}}
    depths = {"depth": {"model.num_layers": [2, 3]}}
    file = study_file(skip=[skip], baseline={"design": "MoE(4/8)"})
    study = make(study_file(axes=read_study(file).axes | depths, skip=[skip], baseline={"design": "MoE(4/8)"}))
    found = {arm.name: arm.baseline for arm in study.arms}
    assert found == {
        f"{arm}_{depth}": f"moe-4-8_prenorm_{depth}"
        for depth in (2, 3)
        for arm in ("moe-4-8_prenorm", "coe-2-2-8_prenorm", "coe-2-2-8_iteration-norm")
    }
    assert [arm.name for arm in study.arms if arm.is_baseline] == ["moe-4-8_prenorm_2", "moe-4-8_prenorm_3"]
    assert study.baseline.name == "moe-4-8_prenorm_2"


def test_an_inherited_baseline_gives_up_an_axis_with_null(study_file: Write) -> None:
    baseline = {"design": "CoE-2(2/8)", "norm_placement": None}
    study = make(study_file(baseline=baseline))
    assert {arm.name: arm.baseline for arm in study.arms} == {
        "moe-4-8_prenorm": "coe-2-2-8_prenorm",
        "coe-2-2-8_prenorm": "coe-2-2-8_prenorm",
        "coe-2-2-8_iteration-norm": "coe-2-2-8_iteration-norm",
    }


@pytest.mark.parametrize("given", ["moe[topk]=2", "moe.topk=2", "moe={topk: 2}"])
def test_what_an_axis_decides_no_override_does(study_file: Write, given: str) -> None:
    with pytest.raises(ConfigError, match=r"is set for all arms: axes\.design sets it too"):
        make(study_file(), given)


LABELS = [
    r"$\frac{a$",
    "a, b",
    "n" * 255,
    "n" * 254 + "m",
    "=1+1",
    "\x00\x1b[31m",
    "a\nb",
    "_",
    "()",
    "..",
    "שלום",
    "🙂",
    "report",
]


def test_labels_are_any_text_and_name_folders(study_file: Write) -> None:
    """No two arms have a folder in common, every one can be made, and more labels do not rename it."""
    axes = {"la, bel": {label: {"moe.ffn_hidden_size": 8 * n} for n, label in enumerate(LABELS, 1)}}
    study = make(study_file(axes=axes, skip=None, baseline={"la, bel": LABELS[0]}))
    names = [arm.name for arm in study.arms]
    assert [arm.labels["la, bel"] for arm in study.arms] == LABELS
    assert len({name.lower() for name in names}) == len(LABELS) and "report" not in names
    assert all(name.isascii() and name[0].isalnum() and "/" not in name and len(name) <= 120 for name in names)
    fewer = {"la, bel": dict(list(axes["la, bel"].items())[:5])}
    again = make(study_file(axes=fewer, skip=None, baseline={"la, bel": LABELS[0]}))
    assert [arm.name for arm in again.arms] == names[:5]


def test_labels_may_be_numbers_and_truth_values_too(study_file: Write) -> None:
    axes = {1: {2: {"moe.topk": 2}, 2.5: {"moe.topk": 3}, True: {"moe.topk": 4}}}
    skip = [{"where": {1: 2.5}, "reason": "x"}]
    study = make(study_file(axes=axes, skip=skip, baseline={1: 2}))
    assert [arm.labels for arm in study.arms] == [{"1": "2"}, {"1": "true"}]
    assert study.skipped == [({"1": "2.5"}, "x")]


def test_values_with_commas_are_labels_that_cannot_be_misread(study_file: Write) -> None:
    paths = [["a", "b, c"], ["a, b", "c"]]
    axes = {"data": {"data.path": [row[0] for row in paths], "zero.deepspeed": [row[1] for row in paths]}}
    with pytest.raises(ConfigError, match=r'baseline.data is \'x\': it must be one of "a, ""b, c""", """a, b"", c"$'):
        make(study_file(axes=axes, skip=None, baseline={"data": "x"}))


def crossed(axes: int, labels: int) -> dict[str, Any]:
    return {f"a{n}": {f"s{n}": list(range(labels))} for n in range(axes)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axes": crossed(9, 10), "skip": None}, "axes give more than 1,000 arms: divide them"),
        ({"seeds": list(range(4000))}, "seeds and axes give more than 2,000 runs: divide them"),
        ({"base": [f"{n}.yaml" for n in range(100)]}, "at most 64 files, none twice"),
        ({"skip": [{"where": {"design": [[["x"]] * 9]}, "reason": "x"}]}, "skip.0.where.design is "),
    ],
)
def test_a_study_too_large_is_refused_before_anything_costs_time(
    study_file: Write, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "resolve", None)
    with pytest.raises(ConfigError) as error:
        make(study_file(**changes))
    assert said in str(error.value) and len(str(error.value)) < 1000
