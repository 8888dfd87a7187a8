"""The settings of a site: one YAML file, every key checked."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.config.checks import argument_hints, check_argument
from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.errors import UserError, unknown_name

PROFILES = Path(__file__).parent / "profiles"
_WORD = re.compile(r"[^\s'\"\\`$;#]+")  # an #SBATCH line takes it without quotes
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_MAIL = (
    "BEGIN",
    "END",
    "FAIL",
    "REQUEUE",
    "TIME_LIMIT",
    "TIME_LIMIT_90",
    "TIME_LIMIT_80",
    "TIME_LIMIT_50",
    "ARRAY_TASKS",
    "ALL",
)


_LEAST = {"gpus_per_node": 0, "cpus_per_task": 1, "signal_seconds": 1, "failures": 0, "first_steps": 1}


@dataclass(frozen=True)
class Container:
    """The image that training runs in.

    Args:
        kind: `pyxis` (an option of srun, by Enroot) or `apptainer`.
        image: a file, or an address such as docker://...
        mounts: SOURCE:TARGET, besides the run folders and the working directory.
        python: the interpreter in the image.
    """

    kind: str
    image: str
    mounts: list[str] = dataclasses.field(default_factory=list)
    python: str = "python3"

    def __post_init__(self) -> None:
        if self.kind not in ("pyxis", "apptainer"):
            raise UserError("kind", unknown_name("kind", self.kind, ("pyxis", "apptainer"), of="container"))
        if any("," in mount or ":" not in mount for mount in self.mounts):
            raise UserError("mounts", f"it is {self.mounts}; each is written SOURCE:TARGET, without a comma")

    @property
    def file(self) -> Path | None:
        """The file of the image; None where the image is an address."""
        return None if "://" in self.image or "#" in self.image else Path(self.image).expanduser()


@dataclass(frozen=True)
class Mail:
    """Who gets mail about a job, and when.

    Args:
        to: an address.
        events: SLURM's names of them.
    """

    to: str
    events: list[str] = dataclasses.field(default_factory=lambda: ["END", "FAIL"])

    def __post_init__(self) -> None:
        for event in self.events:
            if event not in _MAIL:
                raise UserError("events", unknown_name("event", event, _MAIL))
        if not _WORD.fullmatch(self.to):
            raise UserError("to", f"{self.to!r} is no address")


@dataclass(frozen=True)
class Profile:
    """The settings of a site; `profiles/venv.yaml` explains every key.

    Raises:
        UserError: a value that an #SBATCH line or a shell variable cannot hold, or that is out of range.
    """

    name: str
    gpus_per_node: int
    cpus_per_task: int
    time: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpu_type: str | None = None
    memory: str | None = None
    exclusive: bool = False
    sbatch: list[str] = dataclasses.field(default_factory=list)
    before: list[str] = dataclasses.field(default_factory=list)
    modules: list[str] = dataclasses.field(default_factory=list)
    venv: str | None = None
    conda: str | None = None
    container: Container | None = None
    env: dict[str, Any] = dataclasses.field(default_factory=dict)
    interface: str | None = None
    scratch: str | None = None
    caches: str | None = None
    mail: Mail | None = None
    signal: str = "batch"
    signal_seconds: int = 180
    failures: int = 5
    first_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "constraint", "reservation", "gpu_type", "memory"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise UserError(
                    name, f"it is {value!r}; SLURM takes one word there, without blanks or quotes"
                )
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(name, f"it is {getattr(self, name)}; it must be at least {least}")
        if any(not option.startswith("--") or "\n" in option for option in self.sbatch):
            raise UserError(
                "sbatch", f"it is {self.sbatch}; each is one option of sbatch, as --switches=1 is"
            )
        for name in self.env:
            if not _ENVIRONMENT_NAME.fullmatch(name):
                raise UserError(f"env.{name}", "the name of a variable has letters, digits and _")
        if self.signal not in ("batch", "step"):
            raise UserError("signal", unknown_name("signal", self.signal, ("batch", "step")))
        if self.venv and self.conda:
            raise UserError("venv", "it is set beside `profile.conda`; Python comes from one of them")
        minutes(self.time)

    def check_files(self) -> None:
        """Check that the files are there that the job will need.

        Raises:
            UserError: a container image or virtual environment that does not exist.
        """
        image = self.container.file if self.container else None
        if image is not None and not image.exists():
            raise UserError("profile.container.image", f"there is no file {image}")
        activate = Path(self.venv).expanduser() / "bin" / "activate" if self.venv is not None else None
        if activate is not None and not activate.is_file():
            raise UserError("profile.venv", f"there is no file {activate}")


def minutes(text: str) -> int:
    """Return a time limit in minutes, rounded up.

    Args:
        text: as SLURM writes it: MINUTES, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UserError: something else; the key is `time`.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        forms = "MINUTES, HOURS:MINUTES:SECONDS and DAYS-HOURS:MINUTES:SECONDS"
        raise UserError("time", f"{text!r} is no time limit; SLURM's forms are {forms}")
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is not None:
        hours, mins, secs = (fields + [0, 0])[:3]
    elif len(fields) == 3:
        hours, mins, secs = fields
    else:
        hours, mins, secs = 0, *(fields + [0])[:2]
    seconds = ((int(match["days"] or 0) * 24 + hours) * 60 + mins) * 60 + secs
    if seconds == 0:
        raise UserError("time", f"{text!r} is too short; a job needs at least a minute")
    return -(-seconds // 60)


def profile_names() -> dict[str, Path]:
    """Return the profiles that are found by name.

    The user's own are in ~/.config/mhla/profiles (or $MHLA_PROFILES); they hide packaged ones of their name.
    """
    own = Path(os.environ.get("MHLA_PROFILES") or Path.home() / ".config" / "mhla" / "profiles")
    return {path.stem: path for folder in (PROFILES, own) for path in sorted(folder.glob("*.yaml"))}


def load_profile(name: str) -> Profile:
    """Load a profile by path or by name.

    Raises:
        UserError: no such profile, or a key that is missing, unknown or of another type.
    """
    known = profile_names()
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else known.get(name)
    if path is None:
        way = f"write your own from an example in {PROFILES} and give its path"
        raise UserError("profile", f"{unknown_name('profile', name, known)}; {way}")
    values = read_yaml(path)
    if not isinstance(values, Mapping):
        raise UserError(
            str(path), f"the file holds {type(values).__name__}; a profile is a mapping of settings"
        )
    return profile_from(values, path.stem)


def profile_from(values: Mapping[str, Any], name: str) -> Profile:
    """Build a profile of its YAML values.

    Args:
        values: key -> value.
        name: of the profile.

    Raises:
        UserError: a key that is missing, unknown or of another type; keys begin with `profile.`.
    """
    from jsonargparse import ArgumentParser  # not at the top: status and logs read no profile

    from mhla_lightning.config.mistakes import find_mistake

    hints = argument_hints(Profile)
    given = {key: _text(value, hints.get(key)) for key, value in values.items() if value is not None}
    given["name"] = name
    check_argument(given, Profile, "profile")
    if isinstance(values.get("time"), int):
        raise UserError(
            "profile.time",
            f"it is the number {values['time']}: YAML reads 24:00:00 as seconds, so write it in quotes, "
            "time: '24:00:00'",
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Profile, "profile")
    try:
        profile: Profile = parser.instantiate(parser.parse_object({"profile": given})).profile
    except (argparse.ArgumentError, TypeError, ValueError, UserError) as error:
        mistake = find_mistake(given, Profile, "profile")
        raise mistake or UserError("profile", " ".join(str(error).split())) from error
    return profile


def _text(value: Any, hint: Any) -> Any:
    """A whole number as text where the profile has a text: account: 4711, memory: 0."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if number and hint in (str, str | None) else value
