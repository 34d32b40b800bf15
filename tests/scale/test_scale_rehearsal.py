"""Runs of thousands of ranks in one process: what is checked holds, and each planted mistake is refused in one line."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from programs import python, torchrun
from ranks import start_groups

from coe_megatron import sequence_parts
from coe_megatron.checkpoint import integrity, sharding
from coe_megatron.config import load, parse
from coe_megatron.config.checks import check
from coe_megatron.config.settings import BlendPart
from coe_megatron.data import datasets
from coe_megatron.distributed import process_groups
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.distributed.rendezvous import rendezvous
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.run_estimate import vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.local_backend import megatron_compat, without_cuda
from coe_megatron.scale.rehearsal import files, groups, job, samples, shards
from coe_megatron.scale.rehearsal.ranks import as_rank
from coe_megatron.scale.rehearsal.rehearsal import rehearse
from coe_megatron.slurm.job import JobPlan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the program hides GPUs from torch, which this process has loaded with them"
)
PIPELINE = {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "expert": 4}
LAYOUTS: dict[str, tuple[dict, dict, dict]] = {  # of parallel, model and moe
    "data": ({}, {}, {}),
    "expert bias": ({"expert": 4}, {}, {"expert_bias": True, "score_function": "sigmoid"}),
    "interleaved": (PIPELINE, {}, {}),
    "context": ({"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}, {}, {}),
    "dense layers": ({"pipeline": 2, "expert": 2}, {}, {"layer_freq": [0, 1, 1, 1]}),
    "latent attention": ({"tensor": 2, "expert": 8}, {"mla": {"kv_lora_rank": 32, "qk_pos_emb_head_dim": 16}}, {}),
}


def run_of(
    ranks: int, parallel: dict | None = None, model: dict | None = None, moe: dict | None = None, batch: int = 2
) -> RunShape:
    """A small model, with so many samples a step on each replica."""
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "untied_embeddings": True}
    settings = {
        "model": sizes | (model or {}),
        "moe": {"num_experts": 8, "topk": 2, "ffn_hidden_size": 64} | (moe or {}),
        "chain": {"iterations": 2},
        "parallel": parallel or {},
        "training": {"micro_batch": 1, "global_batch": batch * ranks, "precision": "bf16"},
        "data": {"path": "nowhere"},
    }
    config = parse(settings)
    check(config, ranks)
    return RunShape.of(config, 256, ranks)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """No process groups of other tests meanwhile, and the compatibility parts."""
    stood = dist.is_initialized()
    if stood:
        process_groups.stop()
    megatron_compat.install()
    without_cuda.install()
    yield
    if stood:
        start_groups(0, 1, f"file://{tmp_path / 'rendezvous'}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_hold_the_model_once(layout: str, alone: None) -> None:
    run = run_of(64, *LAYOUTS[layout], batch=4)
    held = shards.build_all(run)
    assert len(held) == shards.smallest_world(run) <= 64
    shards.check_once(run, held)
    shards.check_stages(run, held)


@pytest.mark.parametrize(("ranks", "parallel"), [(1024, {"expert": 8}), (1024, PIPELINE | {"context": 2})])
def test_a_thousand_ranks_are_rehearsed(ranks: int, parallel: dict, alone: None) -> None:
    facts = rehearse(run_of(ranks, parallel))
    assert list(facts)[:4] == ["run", "process groups", "shards", "optimizer"]
    assert "128 nodes start each of 1,024 ranks once" in facts["SLURM"]
    assert facts["checkpoint"].startswith("2,053 files, ")
    assert not dist.is_initialized() and not any("\n" in fact for fact in facts.values())


@pytest.mark.slow
def test_sixteen_thousand_ranks_are_rehearsed(alone: None) -> None:
    facts = rehearse(run_of(16_384, {"expert": 8, "pipeline": 2}))
    assert "2,048 nodes start each of 16,384 ranks once" in facts["SLURM"]
    assert facts["checkpoint"].startswith("32,773 files, ")


def test_a_run_of_one_rank_is_rehearsed(alone: None) -> None:
    assert rehearse(run_of(1))["checkpoint"].startswith("7 files, ")


def refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_groups_in_another_order_are_refused(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(64, {"pipeline": 2, "tensor": 2, "expert_tensor": 2})
    create = parallel_state.initialize_model_parallel
    pipelines_first = {"order": "tp-pp-cp-ep-dp"}
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **sizes: create(**sizes, **pipelines_first))
    with as_rank(run, 5, 64):
        refused(lambda: groups.check_own_groups(run, 5), "process groups: the data group of rank 5 has ranks .* not ")


def test_no_group_has_a_copy_for_gloo(alone: None) -> None:
    """A copy would connect each rank to all others of its group at the start."""
    with as_rank(run_of(8, {"expert": 2}), 5, 8):
        for name in (
            "_DATA_PARALLEL_GROUP_GLOO",
            "_DATA_PARALLEL_GROUP_WITH_CP_GLOO",
            "_EXPERT_DATA_PARALLEL_GROUP_GLOO",
        ):
            assert getattr(parallel_state, name) is None


def test_samples_of_another_replica_are_refused(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(8)
    monkeypatch.setattr(groups, "data_shard", lambda: {"dp_rank": 0, "dp_size": 8})
    with as_rank(run, 5, 8):
        refused(
            lambda: groups.check_own_groups(run, 5), "process groups: rank 5 takes the samples of .* not of replica 5"
        )


@pytest.mark.parametrize("changed", ["a rank twice", "another stride"])
def test_groups_that_do_not_divide_the_ranks_are_refused(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, generator = run_of(64, PIPELINE), groups.RankGenerator
    groups.check_all_groups(run)
    ranks_of = generator.get_ranks

    def get_ranks(self: groups.RankGenerator, kind: str) -> list[list[int]]:
        made = ranks_of(self, kind)
        if changed == "a rank twice":
            made[-1][-1] = 0
        elif len(made) > 1 and len(made[0]) > 1:
            made[0][-1], made[1][-1] = made[1][-1], made[0][-1]
        return made

    monkeypatch.setattr(generator, "get_ranks", get_ranks)
    refused(
        lambda: groups.check_all_groups(run), "do not have each rank once" if "twice" in changed else "is ranks .* not "
    )


def shift(place: shards.Place) -> shards.Place:
    key, size, offset, length = place
    return key, size, (offset[0] + 1, *offset[1:]), length


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda main: main[1:], "are not the tensor once|but the model has"),
        (lambda main: (*main, main[0]), "are not the tensor once"),
        (lambda main: (shift(main[0]), *main[1:]), "are not the tensor once"),
        (
            lambda main: ((main[0][0], (1, *main[0][1][1:]), *main[0][2:]), *main[1:]),
            "are not the tensor once|on another",
        ),
        (lambda main: tuple(place for place in main if place[0] != main[0][0]), "but the model has"),
    ],
    ids=["a part less", "a part twice", "a part elsewhere", "another size", "a tensor less"],
)
def test_shards_that_are_not_the_model_once_are_refused(spoil: Callable, said: str, alone: None) -> None:
    run = run_of(64)
    held = shards.build_all(run)
    refused(lambda: shards.check_once(run, [replace(held[0], main=spoil(held[0].main)), *held[1:]]), said)


def test_other_parameters_than_zero_divides_are_refused(alone: None) -> None:
    run = run_of(64, {"expert": 2})
    first, second = shards.build_all(run)
    fewer = [first, replace(second, experts=second.experts - 1)]
    refused(lambda: shards.check_stages(run, fewer), "optimizer: rank 1 holds .* but ZeRO gets")


def test_a_replica_that_writes_again_is_refused(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_main_replica", lambda replica_id: True)
    refused(lambda: rehearse(run_of(64)), "shards: rank 31 of 64 would write .* parts of weights, not the 0")


def test_samples_are_handed_out_once_from_a_blend_too() -> None:
    run = run_of(64)
    blended = replace(run.config.data, blend=[BlendPart("a", 0.7), BlendPart("b", 0.3)])
    assert samples.check_training_order(run) == [64, 32]
    assert samples.check_training_order(replace(run, config=replace(run.config, data=blended))) == [64, 32]
    assert samples.check_training_order(run_of(1, batch=3)) == [1, 1]


def test_the_order_of_samples_takes_so_much_memory() -> None:
    run = run_of(8)
    run = replace(run, config=replace(run.config, training=replace(run.config.training, steps=1_000)))
    order, batch, most = (
        datasets.BlendedOrder([100], [1.0], 1),
        run.config.training.global_batch,
        files.order_bytes(run),
    )
    for step in range(1_000):
        order.between(step * batch, (step + 1) * batch)
    assert most / 2 <= order._corpus_of.nbytes <= most


def test_a_sample_for_two_replicas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda _seed: _Unshuffled())
    refused(lambda: samples.check_training_order(run_of(8)), "sample 1 of nowhere goes to 2 replicas in an epoch")


class _Unshuffled:
    """Permutations that have one sample twice."""

    def permutation(self, size: int) -> np.ndarray:
        found = np.arange(size)
        found[2] = 1
        return found


def test_rows_of_another_replica_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for_step = datasets.StepBatches.for_step

    def of_first(self: datasets.StepBatches, step: int) -> list:
        self._rank = 0
        return for_step(self, step)

    monkeypatch.setattr(datasets.StepBatches, "for_step", of_first)
    refused(lambda: samples.check_training_order(run_of(8)), "replica 1 of step 0 gets others than its part")


def test_a_validation_sample_for_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(8)
    assert samples.check_validation(run) == 9
    fixed = datasets._fixed_batches
    monkeypatch.setattr(datasets, "_fixed_batches", lambda *sizes: fixed(*sizes[:-1], sizes[-1] - 1))
    refused(lambda: samples.check_validation(run), "sample 8 of the validation set goes to no replica")


def test_tokens_of_two_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(8, {"context": 4})
    samples.check_tokens(run)
    monkeypatch.setattr(sequence_parts, "chunks_of", lambda rank, ranks: (rank, rank))
    refused(lambda: samples.check_tokens(run), "the 4 ranks that share a sequence do not have each")


@pytest.mark.parametrize("nodes", [1, 128])
def test_every_rank_of_a_job_is_started_once(nodes: int) -> None:
    assert job.check_job(nodes, 8) < job.LONGEST_ARGUMENT
    first, *_, last = job.processes([f"n{number}" for number in range(nodes)], 8, "torchrun")
    assert (first.rank, first.local_rank, first.node_rank) == (0, 0, 0)
    assert (last.rank, last.local_rank, last.node_rank, last.world_size) == (8 * nodes - 1, 7, nodes - 1, 8 * nodes)
    assert first.agent_store and (first.master_addr, first.master_port) == ("n0", 20_000)


def test_torchruns_parser_reads_the_options_as_the_check_does() -> None:
    from torch.distributed.run import config_from_args, parse_args

    variables = {"COE_NODES": "128", "COE_RANKS_PER_NODE": "8", "SLURM_JOB_ID": "1", "SLURM_NODEID": "127"}
    options = job.torchrun_options(variables | {"MASTER_ADDR": "n0", "MASTER_PORT": "20000"}, Path("logs"))
    found, _, _ = config_from_args(parse_args([*options, "program.py"]))
    assert (found.min_nodes, found.max_nodes, found.nproc_per_node, found.rdzv_configs["rank"]) == (128, 128, 8, 127)
    assert found.rdzv_endpoint == "n0:20000"


def test_a_job_that_starts_a_rank_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "torchrun_options", lambda env, logs, make=job.torchrun_options: [
        option.replace("--node-rank=3", "--node-rank=2") for option in make(env, logs)
    ])  # fmt: skip
    refused(lambda: job.check_job(4, 8), "SLURM: COE_LAUNCH=torchrun does not start each rank once")


def test_a_job_with_too_few_tasks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobPlan, "ranks", property(lambda plan: plan.needed))
    refused(lambda: job.check_job(4, 8), "SLURM: COE_LAUNCH=tasks does not start each rank once|WORLD_SIZE")
    refused(lambda: job.check_job(20_000, 8), "SLURM: the names of 20,000 nodes take 219,999 bytes")


def test_a_checkpoint_that_no_start_would_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = files.CheckpointPlan.of(run_of(16_384, {"expert": 8}), [])
    plan.check()
    monkeypatch.setattr(files, "MAX_MANIFEST_BYTES", 1 << 22)
    refused(plan.check, "checkpoint: complete.json would have 4,.* bytes, but at most 4,194,304 are read of it")


def test_the_manifest_of_sixteen_thousand_ranks_is_read(tmp_path: Path) -> None:
    entry = {"bytes": 10**11, "sha256": 64 * "0"}
    listed = {f"{name}{rank:05d}": entry for rank in range(16_384) for name in ("tensors/__00000_", "random/00")}
    (tmp_path / integrity.MANIFEST).write_text(integrity.manifest_text(listed))
    assert integrity._read_manifest(tmp_path) == listed


def test_so_many_entries_are_in_the_store_of_a_rendezvous() -> None:
    """Ranks as threads; with the config, which rank 0 puts there next, there are two more than ranks."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    envs = [DistributedEnv(rank, 4, master_addr="127.0.0.1", master_port=port) for rank in range(4)]
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(rendezvous, envs))
    before = stores[0].num_keys()
    stores[0].set("config", "")
    assert (before, stores[0].num_keys()) == (4 + 1, 4 + 2)


PROGRAM = """
import atexit, json, os, sys
from collections import Counter

opened, folder = Counter(), sys.argv.pop(1)
sys.addaudithook(lambda event, given: opened.update([str(given[0])]) if event == "open" else None)
atexit.register(lambda: json.dump(opened, open(os.path.join(folder, os.environ["RANK"] + ".json"), "w")))
from coe_megatron.cli.pretrain import main
sys.exit(main())
"""


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["row", "packed"])
def test_two_ranks_open_and_make_as_many_files(
    mode: str, config: Path, prepared: Path, tmp_path: Path, alone: None
) -> None:
    """Counted by Python's audit events in both ranks, in a first start and in a resume."""
    (tmp_path / "program.py").write_text(PROGRAM)
    output, overrides = tmp_path / "run", [f"data.path={prepared}", f"data.samples={mode}"]
    overrides += [f"output={output}", "training.save_every=100"]
    for steps in (1, 2):
        counts = tmp_path / f"{steps}"
        counts.mkdir()
        done = torchrun(tmp_path / "program.py", counts, config, *overrides, f"training.steps={steps}", fresh=True)
        assert done.returncode == 0, done.stderr
    settings = load(config, [*overrides, "training.steps=2"])
    run = resolved(settings, vocabulary(settings), 2)
    held = shards.build_all(run)
    plan = files.CheckpointPlan.of(run, held)

    made = output / "checkpoints" / "step-00000001"
    sizes = {str(path.relative_to(made)): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    assert len(sizes) == plan.total_files
    assert sum(sizes.values()) == pytest.approx(plan.total_bytes, rel=0.1)
    assert {name: sizes[name] for name in plan.sizes if name in sizes} == pytest.approx(
        {name: size for name, size in plan.sizes.items() if name in sizes}, rel=0.25
    )

    first = [opens(tmp_path / "1" / f"{rank}.json") for rank in range(2)]
    second = [opens(tmp_path / "2" / f"{rank}.json") for rank in range(2)]
    assert of(first[1], str(prepared), "index/", besides=".partial") == files.data_opens(settings.data)
    assert of(first[1], str(config)) == 0 < of(first[0], str(config))
    python_files = of(first[1], ".py", "/lib-dynload/")
    assert python_files > 1000
    resume = files.Resume.of(run, held, plan)
    tensors = sum(of(found, f"{made}/tensors/__") for found in second)
    hashed = sum(name.startswith("tensors/__") for name in sizes)
    others = plan.total_files - 1 - hashed
    assert tensors == resume.checked - others + resume.opened


def opens(counts: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(counts.read_text())
    return found


def of(found: dict[str, int], *parts: str, besides: str = "//") -> int:
    """How often files with one of these parts in their paths were opened."""
    return sum(count for path, count in found.items() if any(part in path for part in parts) and besides not in path)


@pytest.mark.run
def test_the_option_prints_facts_or_one_line() -> None:
    small = ("64-gpus.yaml", "model.num_layers=2", "--rehearse")
    found = python("launch/pretrain_coe.py", *small, "--gpus", 16)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("run             16 ranks (data 16, expert 8), ")
    wrong = python("launch/pretrain_coe.py", *small, "--gpus", 12)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "must be a multiple of 8" in wrong.stderr
    assert python("launch/pretrain_coe.py", *small, "--dry-run").returncode == 2
