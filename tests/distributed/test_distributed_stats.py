"""Routing reports on two ranks that count different numbers of tokens: both say what the oracle says of all tokens."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from model_build import HIDDEN, LOSSES, SEQUENCE, copy_from_oracle, make_config, make_layer, make_oracle
from model_oracle import make_batch
from model_reports import Batch, assert_reported, expected_reports
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.model.routing_stats import RoutingReport, report_routing, reset_routing

pytestmark = pytest.mark.ranks
SEQUENCES = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "expert": {"expert_model_parallel_size": 2},
    "tensor": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}
CHAINS = {
    "inner": ChainSettings(3),
    "fixed": ChainSettings(2, "fixed", "outer"),
    "iteration_norm": ChainSettings(2, "shared_router", "init", "iteration_norm"),
}


def batches() -> list[Batch]:
    """Two micro-batches over all ranks; neither halves of sequences nor halves of the batch count equally many."""
    paddings = torch.zeros(2, SEQUENCES, SEQUENCE, dtype=torch.bool)
    paddings[0, 0, 2:] = paddings[0, 1, 5:] = paddings[1, 0, 1:] = paddings[1, 3, 4:] = True
    return [(make_batch(HIDDEN, SEQUENCES, seed=3 + i)[0], padding_BS) for i, padding_BS in enumerate(paddings)]


def of_rank(whole: torch.Tensor) -> torch.Tensor:
    """This rank's sequences [B, S, ...], and with sequence parallelism its places in them."""
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    tp, place = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return whole.chunk(dp, 0)[rank].chunk(tp, 1)[place].contiguous()


def build(chain: ChainSettings, **layout: Any) -> tuple[Any, Any]:
    """Oracle and layer with the same weights on every rank, and on one rank without a layout."""
    config = make_config(**LOSSES, **layout, sequence_parallel="tensor_model_parallel_size" in layout)
    torch.manual_seed(2)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    return oracle, layer


def reports_of_a_rank() -> dict[tuple[str, str], list[RoutingReport]]:
    found = {}
    for name, layout in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**layout)
        model_parallel_cuda_manual_seed(1)
        for chain_name, chain in CHAINS.items():
            layer = build(chain, **layout)[1]
            reset_routing(layer, detailed=True, pairs=True)
            for h_BSD, padding_BS in batches():
                h_SBD = of_rank(h_BSD).transpose(0, 1).contiguous().requires_grad_()
                layer._forward_mlp(h_SBD, padding_mask=of_rank(padding_BS)).sum().backward()
            found[name, chain_name] = report_routing(layer)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, str], list[RoutingReport]]]:
    return run_ranks(reports_of_a_rank, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHAINS)
def test_all_ranks_report_all_tokens(two_ranks: list[dict], single_rank: None, layout: str, name: str) -> None:
    """Losses are means over the micro-batches of a replica, which with `expert` has half the sequences."""
    oracle, _ = build(CHAINS[name])
    whole = expected_reports(oracle, batches())
    if layout == "expert":
        halves = [(h[part], padding[part]) for h, padding in batches() for part in (slice(0, 2), slice(2, 4))]
        for report, by_rank in zip(whole, expected_reports(oracle, halves), strict=True):
            report["losses"] = by_rank["losses"]
    for found in two_ranks:
        assert_reported(found[layout, name], whole)
