"""Profiles, job files, SLURM's answers and the verbs around them, with stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_lightning.cli.main import main
from mhla_lightning.cli.submit import parse_seeds
from mhla_lightning.cluster.jobs import write_job
from mhla_lightning.cluster.profile import PROFILES, load_profile, minutes, profile_from
from mhla_lightning.cluster.queue import parse_sacct, parse_squeue
from mhla_lightning.runs.folder import RunFolder, find_run, find_runs
from mhla_lightning.runs.lock import check_held, hold
from tests.helpers.cluster_stubs import Stub, calls
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE

LEAST: dict[str, Any] = {"gpus_per_node": 0, "cpus_per_task": 1, "time": "10"}


def squeue_line(*fields: str) -> str:
    """As `squeue -O` with widths of 200 prints it."""
    return "".join(field.ljust(200) for field in fields) + "\n"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_profiles_load_and_explain_their_lines(path: Path) -> None:
    assert load_profile(path.stem) == load_profile(str(path))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    top = [line for line in lines if line and not line.startswith(" ") and line not in ("container:", "env:")]
    assert [line for line in top if "#" not in line] == []


def test_one_profile_shows_every_key() -> None:
    """Its values have the right types, too: a key without an example is hard to find."""
    shown = yaml.safe_load((PROFILES / "venv.yaml").read_text())
    every = {field for field in profile_from(LEAST, "x").__dataclass_fields__ if field != "name"}
    assert set(shown) == every


BAD_PROFILES: list[tuple[str, dict[str, Any], str]] = [  # mistake, values, key of the error
    ("missing key", {"cpus_per_task": 1, "time": "10"}, "gpus_per_node"),
    ("unknown key", {**LEAST, "partitions": "gpu"}, "partitions"),
    (
        "nested unknown key",
        {**LEAST, "container": {"kind": "pyxis", "image": "x", "mount": []}},
        "container.mount",
    ),
    ("nested missing key", {**LEAST, "container": {"kind": "pyxis"}}, "container.image"),
    ("nested value", {**LEAST, "container": "x.sif"}, "container"),
    ("type", {**LEAST, "cpus_per_task": "many"}, "cpus_per_task"),
    ("bool for a number", {**LEAST, "gpus_per_node": True}, "gpus_per_node"),
    ("too few", {**LEAST, "cpus_per_task": 0}, "cpus_per_task"),
    ("list of numbers", {**LEAST, "modules": [1]}, "modules.0"),
    ("time without quotes", {**LEAST, "time": 86400}, "time"),
    ("time", {**LEAST, "time": "1 day"}, "time"),
    ("words in a word", {**LEAST, "partition": "gpu --wrap=x"}, "partition"),
    ("newline in an option", {**LEAST, "sbatch": ["--comment=a\n#SBATCH --uid=0"]}, "sbatch"),
    ("variable", {**LEAST, "env": {"A B": 1}}, "env.A B"),
    ("container kind", {**LEAST, "container": {"kind": "docker", "image": "x"}}, "container.kind"),
    (
        "mount",
        {**LEAST, "container": {"kind": "pyxis", "image": "x", "mounts": ["/a"]}},
        "container.mounts",
    ),
    ("signal", {**LEAST, "signal": "shell"}, "signal"),
    ("two pythons", {**LEAST, "venv": "/a", "conda": "b"}, "venv"),
    ("mail event", {**LEAST, "mail": {"to": "me@x.org", "events": ["OFTEN"]}}, "mail.events"),
    ("mail address", {**LEAST, "mail": {"to": "me and you"}}, "mail.to"),
]


@pytest.mark.parametrize(
    ("values", "key"), [case[1:] for case in BAD_PROFILES], ids=[case[0] for case in BAD_PROFILES]
)
def test_bad_profiles(values: dict[str, Any], key: str) -> None:
    with refused(f"profile.{key}"):
        profile_from(values, "x")


def test_numbers_may_be_texts() -> None:
    profile = profile_from({**LEAST, "account": 4711, "memory": 0}, "x")
    assert (profile.account, profile.memory) == ("4711", "0")


def test_an_unknown_profile_and_one_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHLA_PROFILES", str(tmp_path))
    with refused("profile") as error:
        load_profile("pyxi")
    assert "did you mean 'pyxis'" in error.value.reason
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(LEAST))
    assert load_profile("here").name == "here"
    (tmp_path / "list.yaml").write_text("- 1\n")
    with refused(str(tmp_path / "list.yaml")):
        load_profile("list")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("1:30", 2), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("0-00:00:01", 1)],
    ids=lambda value: str(value),
)
def test_minutes(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_seeds() -> None:
    assert parse_seeds(None) == ()
    assert parse_seeds("0-2,7") == (0, 1, 2, 7)
    for text in ("a", "1,1", "3-1", "0:3", ""):
        with refused("array"):
            parse_seeds(text)


def test_squeue_and_sacct_as_recorded() -> None:
    text = squeue_line("12", "RUNNING", "None", "1", "node[1-2]", "9:33", "2026-11-25T16:03:51")
    text += squeue_line(
        "13_1", "PENDING", "(Nodes required for job are DOWN, DRAINED)", "0", "", "10:00", "N/A"
    )
    rows = parse_squeue(text)
    assert rows["12"].__dict__ == {
        "state": "RUNNING",
        "reason": None,
        "restarts": 1,
        "nodes": "node[1-2]",
        "time_left": "9:33",
        "start": "2026-11-25T16:03:51",
    }
    assert (rows["13_1"].reason, rows["13_1"].nodes, rows["13_1"].active) == (
        "(Nodes required for job are DOWN, DRAINED)",
        None,
        True,
    )
    rows = parse_sacct(
        "12|COMPLETED|0:0|node[1-2]\n14|CANCELLED by 1000|0:15|None assigned\n15|FAILED|1:0|node1\n"
    )
    assert [(row.state, row.reason) for row in rows.values()] == [
        ("COMPLETED", None),
        ("CANCELLED", "exit code 0:15"),
        ("FAILED", "exit code 1:0"),
    ]
    assert rows["14"].nodes is None


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe without shards, which queueing does not need. Runs go to tmp_path/runs."""
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    return tmp_path / "tiny.yaml"


def submitted(root: Path, name: str, job: str, attempts: str = "", **progress: Any) -> RunFolder:
    """A run folder as a submission leaves it."""
    run = RunFolder(root / name)
    (run.path / "slurm").mkdir(parents=True)
    run.recipe.write_text("trainer: {}\n")
    write_job(run, {"run_id": name, "jobs": ["3", job]})
    (run.path / "slurm" / "attempts").write_text(attempts)
    if progress:
        run.progress.write_text(
            json.dumps(
                {
                    "step": 10,
                    "max_steps": 30,
                    "consumed": 160,
                    "samples_per_second": 16.0,
                    "loss": 0.5,
                    **progress,
                }
            )
        )
    return run


def rows_of(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert main(["status", *words, "--runs", str(root), "--json", "-"]) == 0
    return {row["run"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_status_with_and_without_accounting(
    tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    submitted(root, "runs", "20", "20 0 started - 0 - 1\n", state="running")
    submitted(root, "requeued", "21", state="preempted")
    submitted(root, "old", "22", "22 0 started - 0 - 1\n22 0 failed 1 0 10 2\n", state="failed")
    submitted(root, "ended", "23", "23 2 started - 0 - 1\n23 2 finished 0 0 30 2\n", state="finished")
    submitted(root, "lost", "24", "24 0 started - 0 - 1\n", state="running")
    lines = squeue_line("20", "RUNNING", "None", "2", "n[1-2]", "1:00:00", "x") + squeue_line(
        "21", "PENDING", "BeginTime", "1", "", "1:00:00", "x"
    )
    stub("squeue", f"printf '%s' '{lines}'")
    stub("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    rows = rows_of(root, capsys)
    states = {name: (row["state"], row["restarts"]) for name, row in rows.items()}
    assert states == {
        "runs": ("RUNNING", 2),
        "requeued": ("REQUEUED", 1),
        "old": ("FAILED", 0),
        "ended": ("COMPLETED", 2),
        "lost": ("UNKNOWN", 0),
    }
    assert rows["runs"]["run_time_left"] == "0:00:20"  # 20 steps of 16 samples at 16 a second
    assert rows["runs"]["job_time_left"] == "1:00:00"
    assert rows["requeued"]["reason"] == "BeginTime"
    assert rows["old"]["reason"] == "exit code 1"
    assert "mhla resume" in rows["lost"]["reason"]
    (asked,) = calls(tmp_path / "bin", "squeue")
    assert sorted(asked[asked.index("-j") + 1].split(",")) == ["20", "21", "22", "23", "24"], (
        "one question for all"
    )

    stub("sacct", "echo '24|NODE_FAIL|0:0|n1'")
    assert rows_of(root, capsys, "lost")["lost"]["state"] == "NODE_FAIL"
    stub("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    row = rows_of(root, capsys, "old")["old"]
    assert (row["state"], row["step"]) == ("FAILED", 10)
    assert "Unable to contact" in row["reason"]
    assert main(["status", "--runs", str(root)]) == 0
    assert "10/30" in capsys.readouterr().out


def test_a_cancel_that_slurm_refuses_leaves_the_run_as_it_was(
    tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(tmp_path, "one", "12")
    stub("squeue", f"printf '%s' '{squeue_line('12', 'RUNNING', 'None', '0', 'n1', '1:00', 'x')}'")
    stub(
        "scancel", "echo 'scancel: error: Kill job error on job id 12: Access/permission denied' >&2; exit 1"
    )
    assert main(["cancel", "one", "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RUN: ")
    assert "Access/permission denied" in error
    assert not (run.path / "slurm" / "cancelled").exists()


def test_a_run_is_found_by_id_folder_and_job(tmp_path: Path) -> None:
    run = submitted(tmp_path, "one", "12_0")
    submitted(tmp_path, "two", "12_1")
    for name in ("one", str(run.path), "12_0"):
        assert find_run(name, tmp_path).path == run.path
    assert [found.run_id for found in find_runs("12", tmp_path)] == ["one", "two"]
    with refused("run"):
        find_run("12", tmp_path)
    with refused("after"):
        find_run("1", tmp_path, key="after")


def test_submit_writes_the_run_folder(
    unpacked: Path, tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("sbatch", 'cat >/dev/null; case "$*" in *--test-only*) ;; *) echo "42;cluster" ;; esac')
    command = [
        "submit",
        str(unpacked),
        "--profile",
        "cpu",
        "--no-check",
        "--trainer.max_steps",
        "3",
        "--json",
        "queued.json",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    (run,) = (RunFolder(path) for path in (tmp_path / "runs").iterdir())
    assert f"job 42: run {run.run_id}, 1 node x 1 process, time limit 60" in out
    assert f"mhla logs {run.run_id} -f" in out
    assert json.loads(Path("queued.json").read_text()) == {"jobs": {run.run_id: "42"}}
    job = json.loads(run.job.read_text())
    assert (job["jobs"], job["recipe"], job["cwd"], job["nodes"], job["devices"]) == (
        ["42"],
        "tiny.yaml",
        str(tmp_path),
        1,
        1,
    )
    assert len(job["git"]["commit"]) == 40
    assert job["environment"]["versions"]["torch"]
    slurm = run.path / "slurm"
    assert yaml.safe_load((slurm / "recipe.yaml").read_text())["trainer"]["max_steps"] == 3
    for file in (
        "cli/main.py",
        "callbacks/checkpoint.py",
        "cluster/train.sbatch.j2",
        "recipes/classification/deit_tiny_mhla_mnist_cpu.yaml",
    ):
        assert (slurm / "code" / "mhla_lightning" / file).is_file()
    assert not any(path.is_symlink() for path in (slurm / "code").rglob("*"))
    assert [call[0] for call in calls(tmp_path / "bin", "sbatch")] == ["--test-only", "--parsable"]

    assert main(command) == 0  # the same again is another run
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [run.run_id, f"{run.run_id}-2"]
    assert main([*command, "--run-id", run.run_id]) == 2
    assert capsys.readouterr().err.startswith("error: --run-id: ")
    stub(
        "sbatch",
        'cat >/dev/null; case "$*" in *--test-only*) ;; *) echo "sbatch: error: Invalid account" '
        ">&2; exit 1 ;; esac",
    )
    assert main([*command, "--run-id", "refused"]) == 2
    assert "Invalid account; asked for nodes 1" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "refused").exists()


def test_a_queued_job_imports_its_copy_of_the_code(unpacked: Path, tmp_path: Path, stub: Stub) -> None:
    """Also from the folder of a checkout, where Python would look first."""
    stub("sbatch", "cat >/dev/null; echo 1")
    assert main(["submit", str(unpacked), "--profile", "cpu", "--no-check", "--run-id", "mine"]) == 0
    code = tmp_path / "runs" / "mine" / "slurm" / "code"
    ask = [sys.executable, "-c", "import mhla_lightning.cluster.slurm as slurm; print(slurm.__file__)"]
    env = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        ask, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(code / "mhla_lightning" / "cluster" / "slurm.py")


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["logs", "one"],
        ["cancel", "one"],
        ["submit", "classification/deit_tiny_mhla_mnist_cpu", "--profile", "cpu", "--dry-run"],
    ],
    ids=str,
)
def test_verbs_import_no_torch_and_answer_in_under_a_second(
    words: list[str], tmp_path: Path, stub: Stub
) -> None:
    submitted(tmp_path / "runs", "one", "5")
    stub("squeue", "")
    stub("sacct", "exit 1")
    command = [*words, "--runs", str(tmp_path / "runs")]
    program = (
        f"import sys, mhla_lightning.cli.main as m; m.main({command!r}); print('torch' in sys.modules, "
        "file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 1


def test_a_process_whose_folder_was_taken_over_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that SLURM has lost trains on; the requeued job takes over the lock."""
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with hold(tmp_path):
        check_held(tmp_path)
        other = json.loads((tmp_path / "lock").read_text()) | {"host": "node2"}
        (tmp_path / "lock").write_text(json.dumps(other))
        with refused(str(tmp_path)):
            check_held(tmp_path)
    assert json.loads((tmp_path / "lock").read_text()) == other, "the lock of the later start stays"


def test_monitor_names_the_ssh_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    run = submitted(tmp_path / "runs", "one", "5")
    run.tensorboard.mkdir()
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6.7.8.9 22")
    stub("python3", 'ls "$4"')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))
    assert main(["monitor", "5", "--port", "7007", "--runs", str(tmp_path / "runs")]) == 0
    out = capfd.readouterr().out
    assert "http://localhost:7007/" in out
    assert "ssh -N -L 7007:localhost:7007 " in out
    assert out.rstrip().endswith("one"), "TensorBoard sees this run alone"
    (words,) = calls(tmp_path / "bin", "python3")
    assert words[:3] == ["-m", "tensorboard.main", "--logdir"]
    assert words[4:] == ["--port", "7007", "--host", "localhost"]
