"""launch/slurm/ on a real slurmctld with eight slurmd: the scheduler ends runs in all its ways, and they go on.

Jobs of several tests run at the same time: they wait for the scheduler more than they compute. n1 and n2 belong to the
job that is ended again and again, n6 and n7 to one that loses one of them, n8 to those that do not heed warnings, n3 to
n5 to all others.
"""

import json
import re
import sys

import pytest
from programs import ROOT
from slurm_cluster import wait_for
from slurm_place import UGLY, Place

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

OTHERS = "--exclude=n1,n2,n6,n7,n8"
DEAF = ("--nodes=1", "--nodelist=n8")
WARNED = "SLURM warns of the time limit"


@pytest.fixture(scope="module")
def ended_often(place: Place) -> str:
    """A job that waits until it is let go; submitted first, so that its time limits come while others run.

    SLURM looks every 30 seconds, and warns up to 30 seconds earlier than asked: here half a minute or so after a start.
    """
    limits = ("--nodelist=n1,n2", "--time=2", "--signal=B:USR1@60")
    return place.submit(*limits, output="ended often", COE_TEST_WAIT="3:often enough", COE_MAX_REQUEUES="9")


@pytest.fixture(scope="module")
def past_its_limit(place: Place) -> str:
    """A job that is still in its third step when its time is up, and is not warned again once it goes on."""
    overrides = ("parallel.expert=1", "training.save_every=2")
    limits = ("--time=2", "--signal=B:USR1@1")
    return place.submit(*DEAF, *limits, output="past its limit", overrides=overrides, COE_TEST_DEAF="3:never")


@pytest.fixture(scope="module")
def undisturbed(place: Place, request: pytest.FixtureRequest) -> str:
    """The output of a job that nothing disturbed, with a name that is nothing but a name.

    Submitted after those that take long, where their tests run.
    """
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in ("ended_often", "past_its_limit"):
        if name in wanted:
            request.getfixturevalue(name)
    output = f"runs/{UGLY}"
    job = place.submit(OTHERS, output=output)
    place.finish(job)
    assert [path.name for path in place.folder.parent.rglob("*executed*") if path.name == "executed"] == []
    assert not (place.cluster.folder / "executed").exists()
    return output


def test_the_quickstart_over_two_nodes(place: Place, undisturbed: str) -> None:
    """EP 2 with a rank on each of two nodes; counts, places and the interface are SLURM's and the network's word."""
    job = place.jobs[-1]  # the only one yet but for those that take long
    first, second = (rank["environment"] for rank in place.seen(job, 0))
    assert (first["SLURM_NODEID"], second["SLURM_NODEID"]) == ("0", "1") == (first["RANK"], second["RANK"])
    assert first["SLURMD_NODENAME"] != second["SLURMD_NODENAME"]
    assert {first["WORLD_SIZE"], second["WORLD_SIZE"]} == {"2"} == {first["COE_NODES"], second["COE_NODES"]}
    assert {first["LOCAL_RANK"], second["LOCAL_RANK"]} == {"0"}
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert (first["GLOO_SOCKET_IFNAME"], first["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    assert place.seen(job, 0)[1]["argv"][3:] == ["a config.yaml", f"output={undisturbed}"]
    log = place.log(job)
    assert "2 ranks (cpu): data 2, expert 2" in log and log.count("validation loss") == 1
    assert "no requeue: the run is done" in log and "default0" not in log
    steps = [line[0] for line in place.losses(undisturbed)]
    assert steps == list(range(13))
    attempt = place.folder / "logs" / job / "attempt-0"
    assert len(list(attempt.glob("ranks/node-[01]/*/attempt_0/0/stderr.log"))) == 2


def test_a_mistake_is_one_line_and_never_comes_back(place: Place) -> None:
    job = place.submit(OTHERS, output="mistaken", overrides=("moe.topk=99",), COE_RANKS_PER_NODE="2")
    place.finish(job, 60, code="2:0")
    assert re.fullmatch(r"pretrain.sbatch: error: moe.topk is 99: .*\n", place.log(job))
    assert place.cluster.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_killed_rank_is_named_and_requeues_without_progress_end(place: Place) -> None:
    """The rank on the second node; the other one says only that it has lost a connection."""
    disturbed = {"COE_TEST_KILL": "1:2", "COE_MAX_REQUEUES": "1", "COE_LAUNCH": "tasks"}
    job = place.submit(OTHERS, output="killed", **disturbed)
    place.finish(job, code="1:0")
    assert place.cluster.job(job)["Restarts"] == "1"
    log = place.log(job)
    told = re.findall(r"^FAILED: rank 1 on n\d: was killed by SIGKILL", log, re.MULTILINE)
    assert len(told) == 2
    assert "no requeue: 2 attempts in a row without progress, COE_MAX_REQUEUES allows 1 requeues" in log


def _numbers(line: tuple[float | None, ...]) -> list[float]:
    return [value for value in line[:3] if value is not None]


@pytest.mark.slow
def test_nodes_go_down(place: Place, undisturbed: str) -> None:
    """One job needs two nodes and takes a third, the other goes on with the one that is left."""
    waits = {"COE_TEST_WAIT": "6:went down", "COE_LAUNCH": "tasks"}
    same = place.submit(OTHERS, output="on other nodes", **waits)
    width = ("--nodes=1-2", "--exclusive", "--exclude=n1,n2,n3,n4,n5,n8")
    fewer = place.submit(*width, output="on fewer nodes", overrides=("parallel.expert=1",), **waits)
    place.wait_for_step("on other nodes", 5)
    place.wait_for_step("on fewer nodes", 5)
    assert [place.nodes(job, 0) for job in (same, fewer)] == [["n3", "n4"], ["n6", "n7"]]
    ports = {place.seen(job, 0)[0]["environment"]["MASTER_PORT"] for job in (same, fewer)}
    assert len(ports) == 2
    for node in ("n4", "n7"):
        place.cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    place.let_go("went down")
    for job in (same, fewer):
        place.finish(job)
        assert place.cluster.job(job)["Restarts"] == "1"
    assert [place.nodes(job, 1) for job in (same, fewer)] == [["n3", "n5"], ["n6"]]
    assert place.losses("on other nodes") == place.losses(undisturbed)
    for found, expected in zip(place.losses("on fewer nodes"), place.losses(undisturbed), strict=True):
        assert _numbers(found) == pytest.approx(_numbers(expected), rel=1e-4)
    place.cluster.ask("scontrol", "update", "NodeName=n4,n7", "State=RESUME")


@pytest.mark.slow
def test_bad_nodes_are_named_and_left_out(place: Place) -> None:
    """With a spare node the job goes on at once; without, it is queued again and asks SLURM for other nodes."""
    checked = {"COE_CHECK_NODES": "1", "COE_LAUNCH": "tasks"}
    spared = place.submit(OTHERS, "--nodes=3", output="spared", COE_SPARE_NODES="1", COE_TEST_BAD="n3", **checked)
    place.finish(spared)
    assert place.nodes(spared, 0) == ["n4", "n5"]
    assert "node n3 is bad: the disk is full\n1 bad node excluded\n" in place.log(spared)
    overrides = ("parallel.expert=1", "training.steps=1")
    avoided = place.submit(OTHERS, "--nodes=1", output="avoided", overrides=overrides, COE_TEST_BAD="n3", **checked)
    place.finish(avoided)
    assert "node n3 is bad: the disk is full\n0 of 1 nodes are good, but 1 are needed\n" in place.log(avoided)
    found = place.cluster.job(avoided)
    assert (found["Restarts"], found["ExcNodeList"]) == (
        "1",
        "n[1-2,6-8],n3",
    )  # what it was told, and what it has found
    assert found["NodeList"] in {"n4", "n5"}


@pytest.mark.slow
def test_a_chain_goes_on_where_requeueing_is_off(place: Place, undisturbed: str) -> None:
    """Three jobs: the first is warned, the second finishes, the third is not needed."""
    script = place.home / "launch" / "slurm" / "chain.sh"
    options = (OTHERS, "--nodes=2", "--")
    (place.folder / "a site.sh").write_text(
        "export SITE_MODULE=\"it's loaded\"\nCOE_CONTAINER=(env 'SITE_BOX=a box')\n"
    )
    site = {"COE_SITE": str(place.folder / "a site.sh")}
    waits = place.environment({"COE_TEST_WAIT": "3:warned", "COE_LAUNCH": "tasks", **site})
    done = place.cluster.run(
        "bash", script, "3", *options, "a config.yaml", "output=in a chain", env=waits, cwd=place.folder
    )
    assert done.returncode == 0, done.stderr
    jobs = done.stdout.split()
    place.jobs += jobs
    place.wait_for_step("in a chain", 2)
    place.cluster.ask("scancel", "--batch", "--signal=USR1", jobs[0])
    place.finish(jobs[0], code="3:0")
    (attempt,) = (place.folder / "logs").glob("chain-*/attempt-0")
    seen = json.loads((attempt / "seen-by-1.json").read_text())["environment"]
    assert (seen["SITE_MODULE"], seen["SITE_BOX"]) == ("it's loaded", "a box")
    place.let_go("warned")
    place.finish(jobs[1])
    assert "the next job of the chain resumes the run" in place.log(jobs[0])
    wait_for(lambda: not place.cluster.ask("squeue", "-h", "-j", jobs[2]), 60, lambda: f"job {jobs[2]} to be gone")
    assert place.log(jobs[2]) == ""
    assert place.losses("in a chain") == place.losses(undisturbed)


@pytest.mark.slow
def test_after_a_warning_too_a_cancelled_job_stays_cancelled(place: Place) -> None:
    overrides = ("parallel.expert=1",)
    job = place.submit(*DEAF, output="cancelled", overrides=overrides, COE_TEST_DEAF="3:heeds")
    place.wait_for_step("cancelled", 2)
    place.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: WARNED in place.log(job), 30, lambda: place.log(job))
    place.cluster.ask("scancel", job)
    wait_for(lambda: "SLURM ends this job" in place.log(job), 30, lambda: place.log(job))
    place.let_go("heeds")
    found = place.cluster.wait(job, 60)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert "SLURM decides whether to restart this job" in place.log(job)


@pytest.mark.slow
def test_past_its_limit_a_job_goes_on_from_its_last_checkpoint(place: Place, past_its_limit: str) -> None:
    """Its ranks did not heed the warning and were killed."""
    job = past_its_limit
    place.finish(job)
    assert int(place.cluster.job(job)["Restarts"]) >= 1 and "SLURM ends this job" in place.log(job)
    assert "resumed at step 2" in place.log(job) and "no requeue: the run is done" in place.log(job)
    assert [line[0] for line in place.losses("past its limit")] == list(range(13))


STUDY_OUTPUT = """-o %j, the study's "runs" $(touch executed); `touch executed`"""
STUDY = f"""
base: a config.yaml
output: {json.dumps(STUDY_OUTPUT)}
set: {{parallel.expert: 1, training.steps: 3}}
axes:
  design:
    MoE(4/8): {{chain.iterations: 1, moe.topk: 4}}
    CoE-2(2/8): {{chain.iterations: 2, moe.topk: 2}}
baseline: {{design: MoE(4/8)}}
seeds: [1]
"""


@pytest.mark.slow
def test_a_study_is_an_array_of_jobs(place: Place) -> None:
    """Through the project as it stands, with a hostile name; a second submission has nothing left to do."""
    (place.folder / "the study.yaml").write_text(STUDY)
    submit = (sys.executable, ROOT / "launch" / "study.py", "submit", "the study.yaml", f"--sbatch={OTHERS}")
    environment = {"COE_PYTHON": sys.executable, "COE_CHECK_NODES": "0"}
    done = place.cluster.run(*submit, env=environment, cwd=place.folder)
    assert done.returncode == 0, done.stderr
    (array,) = re.findall(r"job (\d+): 2 runs of 1 ranks", done.stdout)
    wait_for(lambda: not place.cluster.ask("squeue", "-h", "-j", array), 150, lambda: f"array {array} to be gone")
    logs = [(place.folder / f"slurm-{array}_{task}.log").read_text() for task in (0, 1)]
    assert all("no requeue: the run is done" in log for log in logs), logs
    for arm in ("moe-4-8", "coe-2-2-8"):
        assert [line[0] for line in place.losses(f"{STUDY_OUTPUT}/{arm}/seed-1")] == [0, 1, 2, 3]
    assert not list(place.folder.rglob("executed"))
    again = place.cluster.run(*submit, env=environment, cwd=place.folder)
    assert again.stdout.endswith("all 2 runs are done\n")


@pytest.mark.slow
def test_it_is_requeued_preempted_and_at_its_limit_twice(place: Place, ended_often: str, undisturbed: str) -> None:
    """`scontrol requeue`, preemption by a partition of higher priority, two time limits; then it ends by itself."""
    job, cluster = ended_often, place.cluster
    place.wait_for_step("ended often", 2)
    requeue = ("scontrol", "requeue", job)  # refused while it waits in the queue after a time limit
    wait_for(lambda: cluster.run(*requeue).returncode == 0, 60, lambda: f"job {job} to be running: {place.log(job)}")

    def preempted() -> bool:
        options = ("--partition=urgent", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=true")
        cluster.wait(cluster.ask("sbatch", "--parsable", *options).strip(), 90)
        return "DUE TO PREEMPTION" in place.log(job)

    cluster.wait(job, 60, "RUNNING")
    wait_for(preempted, 120, lambda: f"job {job} to be preempted: {place.log(job)}")
    wait_for(lambda: place.log(job).count(WARNED) >= 2, 250, lambda: f"two time limits: {place.log(job)}")
    place.let_go("often enough")
    place.finish(job)
    log = place.log(job)
    assert "DUE TO JOB REQUEUE" in log and int(cluster.job(job)["Restarts"]) >= 4
    assert log.count("no requeue: the run is done") == 1
    assert place.losses("ended often") == place.losses(undisturbed)
