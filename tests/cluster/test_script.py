"""The batch script: its text for each style of site, its quoting, its decisions when training ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_lightning.cluster.profile import Profile, load_profile, profile_from
from mhla_lightning.cluster.script import SubmitOptions, prepare
from mhla_lightning.config.recipes import Recipe, argument, load_recipe, parse_overrides
from tests.helpers.cluster_stubs import Stub, calls
from tests.helpers.errors import refused

GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch"
CPU, GPU = "classification/deit_tiny_mhla_mnist_cpu", "language/lm_340m_mhla_fineweb_edu"
# golden file: recipe, profile, strategy, options
COMBINATIONS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "cpu-ddp": (CPU, "cpu", "ddp", {"nodes": 2}),
    "cpu-zero2-seeds": (CPU, "cpu", "zero2", {"nodes": 2, "devices": 2, "seeds": (0, 1, 2), "time": "5"}),
    "venv-ddp": (GPU, "venv", "ddp", {"nodes": 4}),
    "conda-zero3": (GPU, "conda", "zero3", {"nodes": 2, "after": ("4711",)}),
    "modules-zero2": (GPU, "modules", "zero2", {"nodes": 8, "time": "1-12"}),
    "pyxis-zero3": (GPU, "pyxis", "zero3", {"nodes": 16}),
    "apptainer-zero2": (GPU, "apptainer", "zero2", {"nodes": 2, "devices": 2}),
    "apptainer-cpu-ddp": (CPU, "apptainer", "ddp", {"devices": 4}),
}


def options(**given: Any) -> SubmitOptions:
    place = {
        "run_id": "mine",
        "runs": Path("/shared/runs"),
        "cwd": Path("/home/me/project"),
        "python": Path("/shared/envs/mhla/bin/python"),
    }
    return SubmitOptions(**{**place, **given})


@pytest.mark.parametrize("name", COMBINATIONS)
def test_golden_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wanted change of the template changes these files, too: the message holds the new text."""
    monkeypatch.setenv("HOME", "/home/me")
    recipe, profile, strategy, given = COMBINATIONS[name]
    made = prepare(
        load_recipe(recipe), load_profile(profile), {"trainer.strategy": strategy}, options(**given)
    )
    assert made.script == (GOLDEN / f"{name}.sh").read_text()
    for run_id, values in made.recipes.items():
        trainer = values["trainer"]
        assert (trainer["strategy"], trainer["num_nodes"], trainer["devices"]) == (
            strategy,
            given.get("nodes", 1),
            made.devices,
        )
        assert f"#SBATCH --ntasks-per-node={trainer['devices']}\n" in made.script
        if "seeds" in given:
            assert run_id == f"mine-seed{values['seed_everything']}"


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (make slurm installs it)"
)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_shellcheck_finds_nothing(name: str) -> None:
    done = subprocess.run(["shellcheck", GOLDEN / f"{name}.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_same_recipe_gives_the_same_text_and_stays_as_it_was() -> None:
    recipe = load_recipe(CPU)
    before = yaml.safe_dump(recipe.values)
    texts = {prepare(recipe, load_profile("cpu"), {}, options()).script for _ in range(2)}
    assert len(texts) == 1
    assert yaml.safe_dump(recipe.values) == before


@pytest.mark.parametrize(
    ("profile", "recipe", "overrides", "workers", "threads"),
    [
        ("venv", GPU, {}, 10, 2),
        ("venv", GPU, {"data.num_workers": 3}, 3, 9),
        ("cpu", CPU, {}, 0, 1),
        ("cpu", CPU, {"data.num_workers": 1}, 1, 1),
    ],
    ids=["gpu", "override", "tiny samples", "one cpu"],
)
def test_workers_and_threads_come_from_the_allocation(
    profile: str, recipe: str, overrides: dict[str, Any], workers: int, threads: int
) -> None:
    made = prepare(load_recipe(recipe), load_profile(profile), overrides, options())
    assert argument(made.recipes["mine"], "data.num_workers") == workers
    assert f"export OMP_NUM_THREADS={threads}\n" in made.script


MISTAKES = [
    (
        "cpu profile, gpu recipe",
        "cpu",
        {"trainer.accelerator": "gpu"},
        {},
        "trainer.accelerator",
    ),
    ("too many devices", "venv", {"trainer.accelerator": "gpu"}, {"devices": 9}, "devices"),
    ("list of devices", "cpu", {"trainer.devices": [0, 1]}, {}, "trainer.devices"),
    ("no node", "cpu", {}, {"nodes": 0}, "nodes"),
    ("seed twice given", "cpu", {"seed_everything": 3}, {"seeds": (1, 2)}, "seed_everything"),
    ("newline in a path", "cpu", {}, {"cwd": Path("/a\nb")}, "cwd"),
    ("colon in a path", "cpu", {}, {"runs": Path("/a:b")}, "runs"),
]


@pytest.mark.parametrize(
    ("profile", "overrides", "given", "key"),
    [case[1:] for case in MISTAKES],
    ids=[case[0] for case in MISTAKES],
)
def test_mistakes(profile: str, overrides: dict[str, Any], given: dict[str, Any], key: str) -> None:
    with refused(key):
        prepare(load_recipe(CPU), load_profile(profile), overrides, options(**given))


# Below the script itself runs, with stand-ins for SLURM's commands.

NASTY = 'it\'s "$(touch pwned)" `touch pwned`; $HOME\nsecond line'


def tiny_profile(**more: Any) -> Profile:
    return profile_from({"gpus_per_node": 0, "cpus_per_task": 1, "time": "10", **more}, "tiny")


def run_script(script: str, runs: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = runs / "script.sh"
    path.write_text(script)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    return subprocess.run(
        ["bash", str(path)],
        env={**os.environ, **job, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_user_text_stays_data(tmp_path: Path, stub: Stub) -> None:
    """Blanks, quotes, newlines and $() of a user reach training as typed; nothing is executed."""
    odd = tmp_path / 'it\'s "$(touch pwned)" `touch pwned`; $HOME'
    (odd / "mine" / "slurm").mkdir(parents=True)
    stub("squeue", "echo RUNNING")
    stub("scontrol", "")
    stub("srun", 'printf "%s" "$NASTY" >got; pwd >where; echo "$PYTHONPATH" >path')
    recipe = Recipe("r", Path("r.yaml"), {"trainer": {"accelerator": "cpu"}, "model": {}, "data": {}})
    made = prepare(
        recipe,
        tiny_profile(env={"NASTY": NASTY}),
        parse_overrides([f"--model.note={json.dumps(NASTY)}"]),
        options(runs=odd, cwd=odd),
    )
    done = run_script(made.script, odd)
    assert done.returncode == 0, done.stderr
    (words,) = calls(tmp_path / "bin", "srun")
    assert words[words.index("run") :] == [
        "run",
        f"{odd}/mine/slurm/recipe.yaml",
        "--runs",
        str(odd),
        "--run-id",
        "mine",
    ]
    assert (odd / "got").read_text() == NASTY
    assert (odd / "where").read_text() == f"{odd}\n"
    assert (odd / "path").read_text().startswith(f"{odd}/mine/slurm/code")
    assert yaml.safe_load(yaml.safe_dump(made.recipes["mine"]))["model"]["note"] == NASTY
    assert not list(tmp_path.rglob("pwned"))


# name, srun's exit code, progress written by this attempt, earlier lines of `attempts`, state in the queue,
# marked cancelled: queued again, verdict
ENDS = [
    ("finished", 0, ("finished", 100), "", "RUNNING", False, False, "finished"),
    ("preempted", 75, ("preempted", 40), "", "RUNNING", False, True, "preempted"),
    ("preempted, other code of srun", 143, ("preempted", 40), "", "RUNNING", False, True, "preempted"),
    ("preempted before the first step", 75, None, "", "RUNNING", False, True, "preempted"),
    (
        "preempted before the first step, again and again",
        75,
        None,
        "7 0 preempted 75 0 0 1\n7 1 preempted 75 0 0 1\n",
        "RUNNING",
        False,
        False,
        "preempted",
    ),
    ("SLURM takes it back itself", 75, ("preempted", 40), "", "COMPLETING", False, False, "preempted"),
    ("time is over", 75, ("preempted", 40), "", "TIMEOUT", False, True, "preempted"),
    ("cancelled by mhla", 75, ("preempted", 40), "", "RUNNING", True, False, "cancelled"),
    ("cancelled by scancel", 75, ("preempted", 40), "", "CANCELLED", False, False, "cancelled"),
    ("user's mistake", 2, None, "", "RUNNING", False, False, "mistake"),
    ("crash at step 0", 1, None, "", "RUNNING", False, False, "failed"),
    ("crash in the first steps", 1, ("failed", 9), "", "RUNNING", False, False, "failed"),
    ("crash later", 1, ("failed", 10), "", "RUNNING", False, True, "failed"),
    ("killed rank", 137, ("running", 50), "", "RUNNING", False, True, "failed"),
    ("last allowed failure", 1, ("failed", 10), "7 0 failed 1 0 10 1\n", "RUNNING", False, True, "failed"),
    (
        "too many failures",
        1,
        ("failed", 10),
        "7 0 failed 1 0 10 1\n7 1 failed 1 0 10 1\n",
        "RUNNING",
        False,
        False,
        "failed",
    ),
    (
        "failures of another job",
        1,
        ("failed", 10),
        "6 0 failed 1 0 10 1\n6 1 failed 1 0 10 1\n",
        "RUNNING",
        False,
        True,
        "failed",
    ),
]


@pytest.mark.parametrize(
    ("code", "progress", "earlier", "queue", "marked", "again", "verdict"),
    [end[1:] for end in ENDS],
    ids=[end[0] for end in ENDS],
)
def test_what_the_script_does_when_training_ends(
    code: int,
    progress: tuple[str, int] | None,
    earlier: str,
    queue: str,
    marked: bool,
    again: bool,
    verdict: str,
    tmp_path: Path,
    stub: Stub,
) -> None:
    run = tmp_path / "runs" / "mine"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "attempts").write_text(earlier)
    (run / "progress.json").write_text(
        json.dumps({"state": "preempted", "step": 30, "seconds": 1}, indent=2)
    )  # of an earlier attempt: says nothing
    if marked:
        (run / "slurm" / "cancelled").write_text("7\n")
    stub("squeue", f"echo {queue}")
    stub("scontrol", "")
    written = (
        json.dumps({"state": progress[0], "step": progress[1], "seconds": 2}, indent=2) if progress else ""
    )
    stub(
        "srun", (f"cat >'{run}/progress.json' <<'END'\n{written}\nEND\n" if progress else "") + f"exit {code}"
    )
    script = prepare(
        load_recipe(CPU), tiny_profile(failures=2), {}, options(runs=run.parent, cwd=tmp_path)
    ).script
    done = run_script(script, run.parent)
    assert calls(tmp_path / "bin", "scontrol") == ([["requeue", "7"]] if again else []), done.stdout
    last = (run / "slurm" / "attempts").read_text().splitlines()[-1].split()
    assert last[:4] == ["7", "0", verdict, str(75 if verdict == "preempted" else code)]
    assert done.returncode == int(last[3])


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_warning_to_the_batch_shell_reaches_training(number: str, tmp_path: Path, stub: Stub) -> None:
    """The shell waits for srun however often it is warned, and keeps the exit code of srun."""
    run = tmp_path / "runs" / "mine"
    (run / "slurm").mkdir(parents=True)
    stub("squeue", "echo RUNNING")
    stub("scontrol", "")
    wait = f"for _ in $(seq 50); do sleep 0.1; [ -e {run}/signals ] && break; done"
    stub("srun", f"trap 'echo got >>{run}/signals' USR1; touch {run}/up; {wait}; sleep 0.5; exit 75")
    script = prepare(load_recipe(CPU), tiny_profile(), {}, options(runs=run.parent, cwd=tmp_path)).script
    warn = (
        f"(while [ ! -e {run}/up ]; do sleep 0.05; done; sleep 0.1; kill -{number} $$; sleep 0.2; kill "
        f"-{number} $$) &\n"
    )
    done = run_script(script.replace("# Train: srun", f"{warn}# Train: srun"), run.parent)
    assert done.returncode == 75, done.stdout + done.stderr
    assert (run / "signals").exists()
    assert calls(tmp_path / "bin", "scontrol") == [["requeue", "7"]]


def test_a_port_that_is_taken_is_left_alone(tmp_path: Path, stub: Stub) -> None:
    """Job ids repeat modulo 16,000, and other programs listen, too."""
    (tmp_path / "runs" / "mine" / "slurm").mkdir(parents=True)
    stub("squeue", "echo RUNNING")
    stub("srun", f"echo $MASTER_PORT >{tmp_path}/port")
    script = prepare(
        load_recipe(CPU), tiny_profile(), {}, options(runs=tmp_path / "runs", cwd=tmp_path)
    ).script
    with socket.create_server(("localhost", 0)) as other:
        taken = other.getsockname()[1]
        run_script(script.replace("15000 + SLURM_JOB_ID % 16000", str(taken)), tmp_path / "runs")
    assert int((tmp_path / "port").read_text()) > taken
    run_script(script, tmp_path / "runs")
    assert 15007 <= int((tmp_path / "port").read_text()) < 15100


def test_an_array_task_speaks_of_itself_only(tmp_path: Path, stub: Stub) -> None:
    """The last task has the number of the array: squeue and scontrol would take it for all tasks."""
    run = tmp_path / "runs" / "mine-seed2"
    (run / "slurm").mkdir(parents=True)
    stub("squeue", "echo RUNNING")
    stub("scontrol", "")
    stub("srun", "exit 75")
    script = prepare(
        load_recipe(CPU), tiny_profile(), {}, options(runs=run.parent, cwd=tmp_path, seeds=(1, 2))
    ).script
    run_script(script, run.parent, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert calls(tmp_path / "bin", "scontrol") == [["requeue", "7_2"]]
    assert all("7_2" in call for call in calls(tmp_path / "bin", "squeue"))
    assert (run / "slurm" / "attempts").read_text().startswith("7_2 0 started")


def test_a_submission_keeps_the_imports_of_the_recipe() -> None:
    recipe = load_recipe(CPU)
    own = Recipe(recipe.name, recipe.path, {"imports": ["my_package.operators"], **recipe.values})
    made = prepare(own, load_profile("cpu"), {"imports": ["mine"]}, options())
    assert [values["imports"] for values in made.recipes.values()] == [["mine"]]
    again = prepare(Recipe("a", recipe.path, made.recipes["mine"]), load_profile("cpu"), {}, options())
    assert again.recipes["mine"]["imports"] == ["mine"]
