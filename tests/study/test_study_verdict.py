"""Verdicts on claims: planted differences, error rates by simulation, and files that users write."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats

from coe_megatron.errors import ConfigError
from coe_megatron.study.report.claims_file import read_claims
from coe_megatron.study.report.verdict import SpreadRatio, Verdict, judge

ROOT = Path(__file__).parents[2]
Program = Callable[..., tuple[int, str, str]]
Losses = Mapping[str, Sequence[float]]  # by label, of the seeds 1, 2, ...
MOE = [4.0, 4.2, 4.1, 4.4]
NOISE = np.array([0.002, -0.001, 0.001, -0.002])


def leave_report(folder: Path, losses: Losses, memory: Mapping[str, int] | None = None, **columns: Losses) -> Path:
    """A report with a row for every loss; further columns of results.csv by label."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ["arm", "axis_design", "axis_norm", "seed", "state", "flops", "valid_loss", *columns]
    rows, timings = [header], [["arm", "seed", "memory_measured"]]
    for label, own in losses.items():
        design, _, norm = label.partition(" ")
        for seed, loss in enumerate(own, 1):
            more = [str(columns[name][label][seed - 1]) for name in columns]
            rows.append([label.lower(), design, norm or "reference", str(seed), "finished", "100", str(loss), *more])
            timings.append([label.lower(), str(seed), str((memory or {}).get(label, 100) + seed % 2)])
    (folder / "results.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    (folder / "timings.csv").write_text("".join(",".join(row) + "\n" for row in timings))
    return folder


def claims_file(folder: Path, *claims: Mapping[str, Any], **common: Any) -> Path:
    """A claims file about `report` beside it; claims that do not say otherwise compare the losses of CoE and MoE."""
    usual = {"arm": "CoE", "other": "MoE", "measure": "loss", "report": "report"}
    listed = [{"id": f"c{number}", "statement": "It is so."} | dict(claim) for number, claim in enumerate(claims)]
    OmegaConf.save(OmegaConf.create(usual | common | {"claims": listed}), folder / "claims.yaml")
    return folder / "claims.yaml"


def judged(folder: Path, *claims: Mapping[str, Any], **common: Any) -> list[Verdict]:
    return judge(read_claims(claims_file(folder, *claims, **common)).claims)


def results(folder: Path, *claims: Mapping[str, Any], **common: Any) -> list[str]:
    return [verdict.result for verdict in judged(folder, *claims, **common)]


def shifted(gain: float, noise: float = 1.0) -> list[float]:
    return list(np.array(MOE) - gain + noise * NOISE)


HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@pytest.mark.parametrize(
    ("gain", "noise", "condition", "result"),
    [
        (0.1, 1, {"relation": "less"}, HOLDS),
        (0.1, 1, {"relation": "greater"}, FAILS),
        (-0.1, 1, {"relation": "greater"}, HOLDS),
        (0.1, 1, {"relation": "less", "by": 0.05}, HOLDS),
        (0.1, 1, {"relation": "less", "by": 0.2}, FAILS),
        (0.1, 100, {"relation": "less"}, OPEN),
        (0.02, 1, {"relation": "less"}, HOLDS),
        (0.02, 1, {"relation": "less", "margin": 0.03}, FAILS),  # less, but by less than the margin
        (0.02, 1, {"relation": "equal", "margin": 0.03}, HOLDS),
        (0.1, 1, {"relation": "equal", "margin": 0.03}, FAILS),
        (-0.1, 1, {"relation": "equal", "margin": 0.03}, FAILS),
        (0.03, 1, {"relation": "equal", "margin": 0.03}, OPEN),
        (0.0, 100, {"relation": "equal", "margin": 0.03}, OPEN),
        (0.1, 1, {"relation": "not_greater", "margin": 0.03}, HOLDS),
        (-0.02, 1, {"relation": "not_greater", "margin": 0.03}, HOLDS),
        (-0.1, 1, {"relation": "not_greater", "margin": 0.03}, FAILS),
        (0.02, 1, {"relation": "not_less", "margin": 0.03}, HOLDS),
        (0.1, 1, {"relation": "not_less", "margin": 0.03}, FAILS),
    ],
)
def test_planted_differences(tmp_path: Path, gain: float, noise: float, condition: dict[str, Any], result: str) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": shifted(gain, noise)})
    assert results(tmp_path, condition) == [result]


def test_numbers_are_those_of_scipy(tmp_path: Path) -> None:
    coe = shifted(0.1)
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": coe})
    (verdict,) = judged(tmp_path, {"relation": "less"})
    tested, (found,) = stats.ttest_rel(coe, MOE), verdict.findings
    assert (found.estimate, found.seeds) == (pytest.approx(-0.1), 4)
    assert found.p_holds == pytest.approx(tested.pvalue) == verdict.p_adjusted
    assert found.interval == pytest.approx(tuple(tested.confidence_interval(0.95)))


def test_p_values_are_corrected_over_the_claims(tmp_path: Path) -> None:
    """A difference with p = 0.02 decides alone, and not among four claims; their p-values are Holm's."""
    spread = np.array([0.9, 1.1, 1.3, 0.7])
    t = stats.t.isf(0.01, 3)
    coe = np.array(MOE) - (spread - 1 + t * spread.std(ddof=1) / 2) / 10
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": list(coe), "same": shifted(0.0, 1000)})
    claim = {"relation": "less"}
    assert results(tmp_path, claim) == [HOLDS]
    verdicts = judged(tmp_path, claim, *({"relation": "less", "arm": "same"} for _ in range(3)))
    assert verdicts[0].result == OPEN and verdicts[0].tests == 4
    assert verdicts[0].p_adjusted == pytest.approx(0.08)


def test_wrong_verdicts_are_seldom_among_all_claims_of_a_file(tmp_path: Path) -> None:
    """Three arms without a difference, and one at the margin of equivalence."""
    random, number, wrong = np.random.default_rng(3), 100, 0
    claims = [{"relation": relation, "arm": arm} for relation in ("less", "greater") for arm in ("a", "b", "c")]
    claims.append({"relation": "equal", "margin": 0.05, "arm": "d"})
    for _ in range(number):
        moe = random.normal(4, 0.1, 5)
        arms = {arm: list(moe + random.normal(0.05 * (arm == "d"), 0.02, 5)) for arm in "abcd"}
        leave_report(tmp_path / "report", {"MoE": list(moe), **arms})
        wrong += HOLDS in results(tmp_path, *claims)
    assert wrong <= stats.binom.ppf(0.999, number, 0.05)


def test_memory_is_compared_without_a_test(tmp_path: Path) -> None:
    """The largest peak of an arm counts: 101 against 81."""
    leave_report(tmp_path / "report", {"MoE": [4.0], "CoE": [3.9]}, {"MoE": 100, "CoE": 80})
    conditions = [{"measure": "memory", "relation": "less", "by": by} for by in (0.19, 0.2)]
    equal = [{"measure": "memory", "relation": "equal", "margin": margin} for margin in (0.1, 0.2)]
    assert results(tmp_path, *conditions, *equal) == [HOLDS, FAILS, FAILS, HOLDS]
    (verdict,) = judged(tmp_path, conditions[0])
    assert verdict.findings[0].estimate == pytest.approx(81 / 101 - 1) and verdict.p_adjusted is None
    assert results(
        tmp_path, {"measure": "flops", "relation": "less"}, {"measure": "flops", "relation": "not_less"}
    ) == [
        FAILS,
        HOLDS,
    ]
    (unknown,) = judged(tmp_path, {"measure": "parameters", "relation": "less"})
    assert (unknown.result, unknown.findings[0].reason) == (OPEN, "an arm has no finished run with a value")


def test_a_claim_holds_if_all_conditions_do(tmp_path: Path) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": shifted(0.0)}, {"MoE": 100, "CoE": 80})
    loss = {"measure": "loss", "relation": "equal", "margin": 0.03}
    less, much_less = ({"measure": "memory", "relation": "less", "by": by} for by in (0.1, 0.5))
    worse = {"measure": "loss", "relation": "less", "by": 0.1}
    absent = {"measure": "accuracy", "relation": "less"}
    pairs = ([loss, less], [loss, much_less], [loss, worse], [loss, absent], [much_less, absent], [worse, absent])
    found = results(tmp_path, *({"all": pair} for pair in pairs))
    assert found == [HOLDS, FAILS, FAILS, OPEN, FAILS, FAILS]


def test_two_seeds_decide_nothing(tmp_path: Path) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE[:2], "CoE": shifted(0.5)[:2]})
    (verdict,) = judged(tmp_path, {"relation": "less"})
    assert (verdict.result, verdict.findings[0].reason) == (OPEN, "fewer than 3 seeds in common")
    assert verdict.tests == 0


def test_seeds_that_would_decide(tmp_path: Path) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": shifted(0.05, 30)})
    (verdict,) = judged(tmp_path, {"relation": "less"})
    (found,) = verdict.findings
    assert verdict.result == OPEN and found.seeds_to_decide is not None
    gains = np.array(MOE) - shifted(0.05, 30)
    errors = gains.std(ddof=1) / math.sqrt(found.seeds_to_decide)
    critical = stats.t.isf(0.025, found.seeds_to_decide - 1)
    assert 0.8 <= stats.nct.sf(critical, found.seeds_to_decide - 1, gains.mean() / errors) < 0.9
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": shifted(0.05)})
    assert judged(tmp_path, {"relation": "less"})[0].findings[0].seeds_to_decide is None


def test_a_validation_set_by_its_name(tmp_path: Path) -> None:
    losses = {"MoE": MOE, "CoE": shifted(0.1)}
    leave_report(tmp_path / "report", losses, valid_loss_text={"MoE": shifted(0.1), "CoE": MOE})
    claim = {"relation": "less"}
    assert results(tmp_path, claim, claim | {"set": "text"}, claim | {"set": "none"}) == [HOLDS, FAILS, OPEN]


def test_an_interaction_is_a_difference_of_differences(tmp_path: Path) -> None:
    """The chain gains 0.3 in one placement, and 0.1 in the other."""
    prenorm = np.array(MOE) + 0.5
    losses = {"MoE": MOE, "CoE": shifted(0.3), "MoE prenorm": list(prenorm), "CoE prenorm": list(prenorm - 0.1)}
    leave_report(tmp_path / "report", losses)
    claim = {"relation": "less", "where": {"norm": "reference"}, "than_in": {"norm": "prenorm"}}
    (verdict,) = judged(tmp_path, claim)
    assert verdict.result == HOLDS and verdict.findings[0].estimate == pytest.approx(-0.2)
    assert results(tmp_path, claim | {"by": 0.25}) == [FAILS]
    both = {"arm": {"design": "CoE", "norm": "prenorm"}, "other": {"design": "MoE", "norm": "reference"}}
    assert judged(tmp_path, {"relation": "greater", **both})[0].findings[0].estimate == pytest.approx(0.4)


def test_loss_at_equal_memory(tmp_path: Path) -> None:
    """Between MoEs of 100 and 400, which differ by 1.0, the loss at 200 is in the middle."""
    losses = {"S": [5.0, 5.1, 5.2], "L": [4.0, 4.1, 4.2], "CoE": [4.3, 4.41, 4.5]}
    memory = {"S": 99, "L": 399, "CoE": 199}
    leave_report(tmp_path / "report", losses, memory)
    claim = {"measure": "loss_at_equal_memory", "relation": "less", "other": ["S", "L"]}
    (verdict,) = judged(tmp_path, claim)
    assert verdict.result == HOLDS and verdict.findings[0].estimate == pytest.approx(-0.19666667)
    (outside,) = judged(tmp_path, claim | {"arm": "L", "other": ["S", "CoE"]})
    assert outside.findings[0].reason == "the arm's memory is not between those of finished sizes"


def test_the_spread_over_seeds(tmp_path: Path) -> None:
    wild, calm = [4.0, 5.0, 3.0, 4.5, 3.5, 4.2, 3.8], [4.0, 4.02, 4.01, 3.99, 3.98, 4.01, 4.0]
    leave_report(tmp_path / "report", {"MoE": calm, "CoE": wild, "same": calm, "still": [4.0] * 7})
    claim = {"measure": "loss_sd", "relation": "greater"}
    verdicts = judged(tmp_path, claim, claim | {"relation": "less"}, claim | {"arm": "same"}, claim | {"arm": "still"})
    assert [verdict.result for verdict in verdicts] == [HOLDS, FAILS, OPEN, OPEN]
    assert verdicts[0].findings[0].estimate == pytest.approx(np.std(wild) / np.std(calm) - 1)
    assert verdicts[3].findings[0].reason == "the loss of an arm does not vary"


def test_the_test_of_spread_keeps_its_level_and_agrees_with_its_interval() -> None:
    random, number = np.random.default_rng(4), 400
    covered = rejected = 0
    for _ in range(number):
        base = random.normal(0, 1, 6)
        ratio = SpreadRatio(list(zip(2 * (base + random.normal(0, 1, 6)), base + random.normal(0, 1, 6), strict=True)))
        low, high = ratio.interval()
        covered += low <= 1.0 <= high
        rejected += 2 * min(ratio.p_below(1.0), ratio.p_above(1.0)) < 0.05
        assert ratio.p_above(low) == pytest.approx(0.025) and ratio.p_below(high) == pytest.approx(0.025)
    most = stats.binom.ppf(0.999, number, 0.05)
    assert number - covered == rejected and 0.02 * number < rejected <= most


def test_a_report_that_is_not_there_yet_decides_nothing(tmp_path: Path) -> None:
    (verdict,) = judged(tmp_path, {"relation": "less"})
    assert (verdict.result, verdict.findings[0].reason) == (OPEN, "there is no report yet")


def test_the_page_has_no_link_to_a_report_that_is_not_there(tmp_path: Path, study_program: Program) -> None:
    file = claims_file(tmp_path, {"id": "lower", "relation": "less"})
    assert study_program("verdict", file, "--to", tmp_path / "docs.md")[0] == 0
    page = (tmp_path / "docs.md").read_text()
    assert "Report: report (not there yet)." in page and "](report" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation": "smaller"}, "claims.0.all.0.relation is 'smaller'"),
        ({"relation": "equal"}, "claims.0.all.0.margin is None: relation equal needs a margin above 0"),
        ({"relation": "less", "marign": 0.1}, "marign"),
        ({"relation": "less", "arm": "Coe"}, "claims.0.all.0.arm is 'Coe': "),
        ({"relation": "less", "other": {"desing": "MoE"}}, "claims.0.all.0.other names the axis 'desing': "),
        ({"relation": "less", "arm": {"norm": "reference"}}, " has 2 arms like that; its arms are "),
        ({"relation": "less", "other": ["MoE"]}, "claims.0.all.0.other must be a list of arms for"),
        ({"relation": "less", "measure": "memory", "by": 1.5}, "claims.0.all.0.by is 1.5: for memory it is a fraction"),
        ({"relation": "less", "measure": "memory", "set": "x"}, "claims.0.all.0.set is 'x': only the measure loss"),
        ({"relation": "less", "measure": "memory", "than_in": {"norm": "x"}}, "claims.0.all.0.than_in: it needs"),
        ({"relation": "less", "all": []}, "claims.0.all"),
    ],
)
def test_mistakes_in_a_claim_are_one_line(
    tmp_path: Path, study_program: Program, changes: dict[str, Any], message: str
) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": MOE})
    status, _, wrong = study_program("verdict", claims_file(tmp_path, changes))
    assert (status, wrong.count("\n")) == (2, 1) and message in wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no arm like that"),
        ("a,b\n1,2\n", "it is damaged: a row has no arm, no seed, or too many cells"),
        ("arm,seed\nx,1,2\n", "it is damaged: a row has no arm, no seed, or too many cells"),
        ("arm,seed\nx,9" + "9" * 5000 + "\n", "it is damaged: a row has no arm"),
        ("arm,seed\nx,1\nx,1\n", "arm x has seed 1 twice"),
        ('arm,seed\n"x,1\n', "it is damaged: "),
        ("arm,axis_a,seed,state,valid_loss\ncoe,CoE,1,finished,low\nmoe,MoE,1,finished,4\n", "valid_loss is 'low'"),
        ("arm,axis_a,seed,state,valid_loss\ncoe,CoE,1,finished,nan\nmoe,MoE,1,finished,4\n", "valid_loss is 'nan'"),
    ],
)
def test_a_damaged_report_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE})
    (tmp_path / "report" / "results.csv").write_text(text)
    with pytest.raises(ConfigError) as raised:
        results(tmp_path, {"relation": "less"})
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_ids_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="claims has the id 'x' twice"):
        judged(tmp_path, {"id": "x", "relation": "less"}, {"id": "x", "relation": "less"})


def test_the_program_writes_the_page_and_json(tmp_path: Path, study_program: Program) -> None:
    leave_report(tmp_path / "report", {"MoE": MOE, "CoE": shifted(0.1)}, {"MoE": 100, "CoE": 80})
    memory = {"id": "smaller | it", "measure": "memory", "relation": "less", "by": 0.15}
    file = claims_file(tmp_path, {"id": "lower", "relation": "less"}, memory, title="My <claims>")
    status, out, _ = study_program("verdict", file, "--to", tmp_path / "docs.md")
    page = (tmp_path / "docs.md").read_text()
    assert (status, out) == (0, "") and page.startswith("# My &#60;claims&#62;\n")
    assert "Of 2 claims, 2 hold, 0 do not, and 0 are undecided." in page
    assert "| lower | It is so. | **holds** | -0.1000 (-0.10" in page and "## smaller &#124; it: holds" in page
    assert "final validation loss of CoE reference is less than that of MoE reference | -0.1000 | -0.10" in page
    assert "less than that of MoE reference, by at least 15.0% | -19.8% | - | - | 4 | - |" in page
    assert "Report: [report](report/report.md)." in page
    status, out, _ = study_program("verdict", file, "--json")
    first, second = json.loads(out)
    assert status == 0 and first["result"] == second["result"] == HOLDS
    assert first["conditions"][0]["difference"] == pytest.approx(-0.1) and first["p_adjusted"] < 0.001
    assert second["conditions"][0]["p_holds"] is None and second["p_adjusted"] is None
    assert study_program("verdict", file)[1].splitlines()[:8] == page.splitlines()[:8]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, study_program: Program) -> None:
    file = claims_file(tmp_path, {"relation": "less"})
    status, _, wrong = study_program("verdict", file, "--to", tmp_path)
    assert (status, wrong.count("\n")) == (2, 1) and "--to is " in wrong
    assert study_program("verdict", tmp_path / "none.yaml")[0] == 2


def test_the_projects_claims_can_be_judged() -> None:
    """Every arm that they name is in its report, if that is there."""
    claims = read_claims(ROOT / "configs" / "studies" / "claims.yaml").claims
    assert len(claims) > 10 and len(judge(claims)) == len(claims)
