"""launch/kubernetes/pytorchjob.yaml against the operator's own schema, and against the programs that it starts."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from programs import ROOT

from coe_megatron.cli import one_host
from coe_megatron.config import load
from coe_megatron.run.exit_status import ExitStatus


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    read = json.loads((Path(__file__).parent / "pytorchjob-v1.json").read_text())
    return Draft202012Validator(strict(read))


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())


def strict(schema: Any) -> Any:
    """With unknown keys refused, as `kubectl create --validate=strict` does; the schema itself drops them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made and made.get("type") == "object":
        made["additionalProperties"] = False
    return made


def worker(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return worker(job)["template"]["spec"]


def test_the_example_is_valid(schema: Draft202012Validator, job: dict[str, Any]) -> None:
    assert [error.message for error in schema.iter_errors(job)] == []


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda job: worker(job).update(restartPolcy="Never"), "'restartPolcy' was unexpected"),
        (lambda job: worker(job).update(replicas="two"), "'two' is not of type 'integer'"),
        (lambda job: pod(job).pop("containers"), "'containers' is a required property"),
        (lambda job: pod(job)["containers"][0].update(env={"A": "b"}), "is not of type 'array'"),
        (lambda job: job["spec"].update(nprocPerNode=8), "8 is not of type 'string'"),
        (lambda job: pod(job)["volumes"][2]["emptyDir"].update(sizeLimit="much"), "'much' does not match"),
    ],
)
def test_the_schema_finds_mistakes(break_it: Any, says: str, schema: Draft202012Validator, job: dict[str, Any]) -> None:
    broken = copy.deepcopy(job)
    break_it(broken)
    assert any(says in error.message for error in schema.iter_errors(broken))


def test_the_container_starts_what_there_is(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (container,) = pod(job)["containers"]
    assert container["name"] == "pytorch"
    python, program, *arguments = container["command"]
    assert (python, program) == ("python", "launch/one_host.py")
    options = one_host.make_parser().parse_args(arguments)
    assert options.kubeflow
    trains, config, *overrides = options.torchrun
    ranks = worker(job)["replicas"] * int(job["spec"]["nprocPerNode"])
    assert trains == "launch/pretrain_coe.py"
    load(config, overrides, ranks)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod(job)["volumes"]}


def test_kubeflow_starts_again_what_may_go_on_and_nothing_else() -> None:
    assert worker_statuses() == {status: status.retryable for status in ExitStatus if status != ExitStatus.DONE}
    assert one_host.kubeflow(ExitStatus.DONE) == 0


def worker_statuses() -> dict[ExitStatus, bool]:
    """By status whether the operator starts the pod again: from 128 on."""
    statuses = [status for status in ExitStatus if status != ExitStatus.DONE]
    return {status: one_host.kubeflow(status) >= 128 for status in statuses}
