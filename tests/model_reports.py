"""Routing reports as they should be, taken from the oracle's chain by other means than the layer's sums.

T: counted tokens of all batches together, N: experts, D: hidden.
"""

from typing import Any

import torch

from coe_megatron.chain.method import ChainOfExperts, ChainOutput
from coe_megatron.model.routing_stats import RoutingReport

LOSS_NAMES = {"seq_aux_loss": "seq_load_balancing_loss", "aux_loss": "load_balancing_loss", "z_loss": "z_loss"}
Batch = tuple[torch.Tensor, torch.Tensor]  # h [B, S, D], padding [B, S]


def expected_reports(oracle: ChainOfExperts, batches: list[Batch]) -> list[dict[str, Any]]:
    """The fields of each iteration's report; losses only where each batch is a micro-batch of one rank."""
    passes = [_followed(oracle, *batch) for batch in batches]
    seen: list[set[int]] = [set() for _ in range(sum(int((~padding).sum()) for _, padding in batches))]
    return [_expected(oracle, t, passes, seen) for t in range(oracle.chain.iterations)]


def assert_reported(reports: list[RoutingReport], expected: list[dict[str, Any]]) -> None:
    """Every field of every report, to fp32's rounding."""
    assert len(reports) == len(expected)
    for report, truth in zip(reports, expected, strict=True):
        found = dict(vars(report))
        assert found.keys() == truth.keys()
        for name in truth:
            value, goal = torch.tensor(_numbers(found[name])), torch.tensor(_numbers(truth[name]))
            near = 1e-6 if name in ("increment_cosines", "single_scale") else 0  # differences that may cancel
            torch.testing.assert_close(value, goal, rtol=2e-5, atol=near, msg=f"{name}: {found[name]} is not {goal}")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [value[name] for name in sorted(value)]
    return value if isinstance(value, list) else [] if value is None else [value]


@torch.no_grad()
def _followed(
    oracle: ChainOfExperts, h_BSD: torch.Tensor, padding_BS: torch.Tensor
) -> tuple[ChainOutput, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The oracle's output, its counted tokens, every F_t, and x(0) to x(C)."""
    increments: list[torch.Tensor] = []
    experts = oracle._experts
    oracle._experts = lambda *args: increments.append(experts(*args)) or increments[-1]
    try:
        result = oracle(h_BSD, padding_BS)
    finally:
        del oracle._experts
    h_TD = h_BSD.flatten(0, 1)
    states = [h_TD if oracle.chain.norm_placement == "iteration_norm" else oracle._norm(h_TD, 0)]
    for increment in increments:
        states.append(increment + {"inner": states[-1], "init": states[0], "outer": 0.0}[oracle.chain.residual])
    return result, ~padding_BS.flatten(), increments, states


def _expected(oracle: ChainOfExperts, t: int, passes: list, seen: list[set[int]]) -> dict[str, Any]:
    """One iteration; `seen` gets the experts that each token visits in it."""
    chosen_TN = _chosen(passes, t)
    scores_TN = torch.cat([result.routings[t].scores_TN[counted] for result, counted, _, _ in passes]).double()
    shares_TN = scores_TN / scores_TN.sum(1, keepdim=True)
    before, after = (torch.cat([states[i][counted] for _, counted, _, states in passes]).double() for i in (t, t + 1))
    increment = _increments(passes, t)
    load = chosen_TN.sum(0).tolist()
    repeated = [len(seen[i] & set(row.nonzero().flatten().tolist())) for i, row in enumerate(chosen_TN)]
    for i, row in enumerate(chosen_TN):
        seen[i] |= set(row.nonzero().flatten().tolist())
    return {
        "layer": 1,
        "iteration": t + 1,
        "losses": _losses(oracle, t, [result for result, _, _, _ in passes]),
        "load": [part / sum(load) for part in load],
        "load_max_over_mean": max(load) / (sum(load) / len(load)),
        "dead_experts": len([part for part in load if part == 0]),
        "entropy": float(-(shares_TN * shares_TN.log()).sum(1).mean()),
        "dropped": 0.0,
        "overlap": sum(repeated) / len(repeated) / oracle.router.topk if t else None,
        "state_norm": float(after.square().mean().sqrt()),
        "increment_norm": float(increment.square().mean().sqrt()),
        "increment_over_state": float(increment.norm() / before.norm()),
        "increment_cosines": _cosines(passes, t) or None,
        "single_scale": _explained(passes, t, oracle.chain.residual == "inner") if t else None,
        "pairs": (_chosen(passes, t - 1).T.long() @ chosen_TN.long()).tolist() if t else None,
    }


def _increments(passes: list, t: int) -> torch.Tensor:
    return torch.cat([increments[t][counted] for _, counted, increments, _ in passes]).double()


def _cosines(passes: list, t: int) -> list[float]:
    """Of the increment with each earlier one, from unit vectors."""
    units = [torch.nn.functional.normalize(_increments(passes, s), dim=1) for s in range(t + 1)]
    return [float((unit * units[t]).sum(1).mean()) for unit in units[:t]]


def _explained(passes: list, t: int, sums: bool) -> float:
    """R² of a least-squares fit of all components of the increments so far by those of the first."""
    first_V1 = _increments(passes, 0).view(-1, 1)
    total_V1 = (
        sum(_increments(passes, s) for s in range(t + 1)).view(-1, 1) if sums else _increments(passes, t).view(-1, 1)
    )
    fitted_V1 = first_V1 @ torch.linalg.lstsq(first_V1, total_V1).solution
    return float(1 - (total_V1 - fitted_V1).square().sum() / total_V1.square().sum())


def _chosen(passes: list, t: int) -> torch.Tensor:
    return torch.cat([result.routings[t].chosen_TN[counted] for result, counted, _, _ in passes])


def _losses(oracle: ChainOfExperts, t: int, results: list[ChainOutput]) -> dict[str, float]:
    coefficients = {
        "seq_aux_loss": oracle.router.seq_aux_coeff,
        "aux_loss": oracle.router.aux_coeff,
        "z_loss": oracle.router.z_coeff,
    }
    return {
        LOSS_NAMES[name]: sum(float(result.losses[t][name]) for result in results) / coefficients[name] / len(results)
        for name in results[0].losses[t]
    }
