"""Importing patches nothing, and what the compatibility parts are there for is still so.

The contract tests run Megatron as it is, in a process without our parts. One that fails says that a newer Megatron has
mended what a part works around: the part (or a line of it) can go, or has to change.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import get_cuda_rng_tracker, random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from coe_megatron.local_backend import megatron_compat, without_cuda

pytestmark = pytest.mark.thorough

OLD = version("megatron-core") == "0.16.1"  # else 0.19.2: a third release has to be looked at
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA, so Megatron's own code runs")
no_te = pytest.mark.skipif(megatron_compat.has_transformer_engine(), reason="Transformer Engine is installed")

AS_IT_IS = """
import json, sys
import coe_megatron, coe_megatron.chain.settings
found = {"loaded by the package": sorted({"torch", "megatron", "deepspeed"} & set(sys.modules))}

import torch
def names():
    return {"current_device": id(torch.cuda.current_device), "synchronize": id(torch.cuda.synchronize)}
before = names()
import coe_megatron.model, coe_megatron.local_backend.without_cuda, coe_megatron.local_backend.megatron_compat
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher
found["loaded by the modules"] = sorted({"deepspeed"} & set(sys.modules))
found["torch.cuda is as it was"] = names() == before
found["names of Megatron"] = [
    hasattr(moe_utils, "te_general_gemm"), multi_latent_attention.HAVE_TE, random.CudaRNGStatesTracker.__name__,
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream,
    token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize.__module__, schedules.torch is torch,
]

def attempt(function):
    try:
        function()
        return "works"
    except Exception as error:
        return type(error).__name__

from types import SimpleNamespace
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, num_moe_experts=2,
    moe_ffn_hidden_size=8, add_bias_linear=False, moe_token_dispatcher_type="alltoall", moe_router_pre_softmax=True)
group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
groups = SimpleNamespace(ep=group, expt_tp=group, tp_ep=group, tp=group, cp=group, tp_cp=group, tp_dp_cp=group)
x = torch.ones(2, 2)
found["router"] = attempt(lambda: moe_utils.router_gating_linear(x, x, None, torch.float32))
found["dispatcher"] = attempt(
    lambda: token_dispatcher.MoEAlltoAllTokenDispatcher(2, [0, 1], config=config, pg_collection=groups))
found["splits"] = type(moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)).__name__
found["generators"] = attempt(lambda: random.CudaRNGStatesTracker().add("name", 1))
found["current_device"] = attempt(torch.cuda.current_device)
found["synchronize"] = attempt(torch.cuda.synchronize)
sequence_parallel = SimpleNamespace(**{**vars(config), "sequence_parallel": True, "persist_layer_norm": False})
found["local norm"] = attempt(lambda: WrappedTorchNorm(sequence_parallel, 16))
found["k_channels"] = attempt(
    lambda: DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups, k_channels=8))
found["TELinear"] = attempt(lambda: isinstance(x, multi_latent_attention.TELinear))
import torch.distributed, tempfile
from megatron.core import parallel_state
torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/meeting", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model = torch.nn.Linear(2, 1)
model.config, model.model_type, model.set_input_tensor = config, None, lambda tensor: None
schedule = lambda: schedules.get_forward_backward_func()(
    forward_step_func=lambda data, model: (model(x).sum(), lambda loss: (loss, {})),
    data_iterator=None, model=model, num_microbatches=1, seq_length=1, micro_batch_size=1)
found["schedule"] = attempt(schedule)
specs = get_gpt_decoder_block_spec(config, use_transformer_engine=False).layer_specs
found["shared specs"] = specs[0] is specs[1]
for _ in range(2):
    moe_utils.save_to_aux_losses_tracker("loss", torch.tensor(1.0), 1, 1)
if hasattr(moe_utils, "get_moe_metrics_tracker"):
    found["tracker"] = moe_utils.get_moe_metrics_tracker()._metrics["loss"].values.tolist()
else:
    found["tracker"] = moe_utils.get_moe_layer_wise_logging_tracker()["loss"]["values"].tolist()
from megatron.core.transformer.moe.router import TopKRouter
counting = SimpleNamespace(enable_expert_bias=True, local_tokens_per_expert=torch.zeros(2))
padding = torch.zeros(3, dtype=torch.bool)
plain = getattr(TopKRouter._apply_expert_bias, "_torchdynamo_orig_callable", TopKRouter._apply_expert_bias)
found["padding and expert bias"] = attempt(lambda: plain(counting, torch.ones(3, 2, dtype=torch.bool), padding))
coe_megatron.local_backend.without_cuda.install()
found["schedule, installed"] = attempt(schedule)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def as_it_is() -> dict:
    """What a fresh interpreter finds that installs none of the compatibility parts."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", AS_IT_IS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_no_engine(as_it_is: dict) -> None:
    assert as_it_is["loaded by the package"] == []
    assert as_it_is["loaded by the modules"] == []


@no_te
def test_importing_the_modules_patches_nothing(as_it_is: dict) -> None:
    assert as_it_is["torch.cuda is as it was"] is True
    assert as_it_is["names of Megatron"] == [
        not OLD,  # te_general_gemm is there
        OLD,  # HAVE_TE of multi-latent attention
        "CudaRNGStatesTracker",
        None,  # cuda_dtoh_stream
        "megatron.core.transformer.moe.token_dispatcher",
        True,  # schedules have torch as it is
    ]


@no_te
def test_contract_without_transformer_engine(as_it_is: dict) -> None:
    """`megatron_compat.install` is needed for the first two in 0.16.1, our norm and core attention for the others."""
    found = {name: as_it_is[name] for name in ("router", "TELinear", "local norm", "k_channels")}
    assert found == {
        "router": "NameError" if OLD else "works",
        "TELinear": "TypeError",
        "local norm": "AssertionError",
        "k_channels": "TypeError",
    }


@no_cuda
def test_contract_without_cuda(as_it_is: dict) -> None:
    for name in ("dispatcher", "generators", "current_device", "synchronize", "schedule"):
        assert as_it_is[name] not in ("works", "NameError"), name
    assert as_it_is["splits"] == "Tensor"  # on CPU they stay what all_to_all_single refuses
    assert as_it_is["schedule, installed"] == "works"


def test_contract_of_chains(as_it_is: dict) -> None:
    """Why specs are copied, losses kept by iteration, and the router counts loads by itself."""
    assert as_it_is["shared specs"] is True
    assert as_it_is["tracker"] == [2.0]
    assert as_it_is["padding and expert bias"] == "RuntimeError"


@no_cuda
def test_installing_twice_changes_nothing_more(single_rank: None) -> None:
    def names() -> list[Callable]:
        dispatcher = MoEAlltoAllTokenDispatcher
        return [
            random.CudaRNGStatesTracker,
            torch.cuda.current_device,
            dispatcher._maybe_dtoh_and_synchronize,
            schedules.torch.zeros,
        ]

    before = names()
    megatron_compat.install()
    without_cuda.install()
    assert names() == before


@no_cuda
def test_schedules_alone_have_another_zeros(single_rank: None) -> None:
    assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device == torch.device("cpu")
    assert schedules.torch.zeros(2, 3, device="meta").is_meta
    assert schedules.torch.Tensor is torch.Tensor and torch.zeros is not schedules.torch.zeros


@no_cuda
def test_generator_states_are_kept_apart(single_rank: None) -> None:
    tracker = type(get_cuda_rng_tracker())()
    tracker.add("one", 1)
    tracker.add("two", 2)
    outside = torch.get_rng_state()
    with tracker.fork("one"):
        first = torch.rand(3)
    with tracker.fork("two"):
        other = torch.rand(3)
    with tracker.fork("one"):
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(torch.cat([first, second]), torch.rand(6, generator=generator))
    assert torch.equal(other, torch.rand(3, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="'one' already exists"):
        tracker.add("one", 3)
    with pytest.raises(ValueError, match="no generator state 'three'"), tracker.fork("three"):
        pass
