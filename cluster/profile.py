"""What is special about a site: one YAML file, every key checked."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.errors import UserError, unknown_name

PROFILES = Path(__file__).parent / "profiles"
_WORD = re.compile(r"[^\s'\"\\`$;#]+")  # what an #SBATCH line takes without quoting
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


@dataclass(frozen=True)
class Container:
    """The image that training runs in.

    kind: pyxis (srun's --container-image, by Enroot) or apptainer. image: a file, or an address such as
        docker://... mounts: SOURCE:TARGET besides
    the run folders and the working directory, which are always there. python: in the image.
    """

    kind: str
    image: str
    mounts: list[str] = dataclasses.field(default_factory=list)
    python: str = "python3"

    def __post_init__(self) -> None:
        if self.kind not in ("pyxis", "apptainer"):
            raise UserError(unknown_name("kind", self.kind, ("pyxis", "apptainer"), of="container"))
        if any("," in mount or ":" not in mount for mount in self.mounts):
            raise UserError(
                f"container.mounts is {self.mounts}; each is written SOURCE:TARGET, without a comma"
            )

    @property
    def file(self) -> Path | None:
        """The image's file; None where the image is an address that the site's tool resolves."""
        return None if "://" in self.image or "#" in self.image else Path(self.image).expanduser()


@dataclass(frozen=True)
class Mail:
    """to: an address. events: SLURM's names of them."""

    to: str
    events: list[str] = dataclasses.field(default_factory=lambda: ["END", "FAIL"])

    def __post_init__(self) -> None:
        for event in self.events:
            if event not in _MAIL:
                raise UserError(unknown_name("event", event, _MAIL, of="mail.events"))


@dataclass(frozen=True)
class Profile:
    """A site's settings; `profiles/venv.yaml` explains every key.

    Raises:
        UserError: a value that an #SBATCH line or a shell variable cannot hold, or that makes no sense.
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
                    f"{name} of profile {self.name} is {value!r}; SLURM takes one word there, "
                    "without blanks or quotes"
                )
        for name, low in (
            ("gpus_per_node", 0),
            ("cpus_per_task", 1),
            ("signal_seconds", 1),
            ("failures", 0),
            ("first_steps", 1),
        ):
            if getattr(self, name) < low:
                raise UserError(
                    f"{name} of profile {self.name} is {getattr(self, name)}; it must be at least {low}"
                )
        if any(not option.startswith("--") or "\n" in option for option in self.sbatch):
            raise UserError(
                f"sbatch of profile {self.name} is {self.sbatch}; each is one option of sbatch, such "
                "as --switches=1"
            )
        for name in self.env:
            if not _ENVIRONMENT_NAME.fullmatch(name):
                raise UserError(
                    f"env of profile {self.name} has the key {name!r}; a variable's name has "
                    "letters, digits and _"
                )
        if self.signal not in ("batch", "step"):
            raise UserError(unknown_name("signal", self.signal, ("batch", "step"), of=f"profile {self.name}"))
        if self.venv and self.conda:
            raise UserError(f"profile {self.name} sets venv and conda; Python comes from one of them")
        if self.mail is not None and not _WORD.fullmatch(self.mail.to):
            raise UserError(f"mail.to of profile {self.name} is {self.mail.to!r}; that is no address")
        minutes(self.time, f"time of profile {self.name}")

    def check_files(self) -> None:
        """What the job will look for must be there now.

        Raises:
            UserError: a container image or virtual environment that does not exist.
        """
        image = self.container.file if self.container else None
        if image is not None and not image.exists():
            raise UserError(f"container.image of profile {self.name}: there is no {image}")
        if self.venv is not None and not (Path(self.venv).expanduser() / "bin" / "activate").is_file():
            raise UserError(
                f"venv of profile {self.name}: there is no "
                f"{Path(self.venv).expanduser() / 'bin' / 'activate'}"
            )


def minutes(text: str, key: str) -> int:
    """A time limit as SLURM writes it (MINUTES, H:M:S, M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up.

    Raises:
        UserError: something else.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(
            f"{key} is {text!r}; SLURM's forms are MINUTES, HOURS:MINUTES:SECONDS and "
            "DAYS-HOURS:MINUTES:SECONDS"
        )
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is not None:
        hours, mins, secs = (fields + [0, 0])[:3]
    elif len(fields) == 3:
        hours, mins, secs = fields
    else:
        hours, mins, secs = 0, *(fields + [0])[:2]
    seconds = ((int(match["days"] or 0) * 24 + hours) * 60 + mins) * 60 + secs
    if seconds == 0:
        raise UserError(f"{key} is {text!r}; a job needs some time")
    return -(-seconds // 60)


def profile_names() -> dict[str, Path]:
    """Profiles that are found by name: yours in ~/.config/mhla/profiles (or $MHLA_PROFILES) before the
    packaged examples.
    """
    own = Path(os.environ.get("MHLA_PROFILES") or Path.home() / ".config" / "mhla" / "profiles")
    return {path.stem: path for folder in (PROFILES, own) for path in sorted(folder.glob("*.yaml"))}


def load_profile(name: str) -> Profile:
    """A profile by path or by name.

    Raises:
        UserError: no such profile, a key that is missing, unknown or of another type.
    """
    known = profile_names()
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else known.get(name)
    if path is None:
        raise UserError(
            unknown_name("profile", name, known)
            + f"; write your own from an example in {PROFILES} and give its path"
        )
    values = read_yaml(path)
    if not isinstance(values, Mapping):
        raise UserError(
            f"{path} is no profile: it holds {type(values).__name__}, a profile is a mapping of settings"
        )
    return profile_from(values, path.stem)


def profile_from(values: Mapping[str, Any], name: str) -> Profile:
    """A profile from its YAML values.

    Raises:
        UserError: a key that is missing, unknown or of another type.
    """
    built: Profile = _build(Profile, {**values, "name": name}, f"profile {name}", "")
    return built


def _build(kind: type, values: Mapping[str, Any], of: str, prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise UserError(
                unknown_name(
                    "key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields if name != "name"], of=of
                )
            )
    for field in fields.values():
        if (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and values.get(field.name) is None
        ):
            raise UserError(
                f"{of} has no key '{prefix}{field.name}'; it needs one: "
                f"{_type_name(hints[field.name])}, see {PROFILES / 'venv.yaml'}"
            )
    given = {key: value for key, value in values.items() if value is not None}
    return kind(**{key: _typed(value, hints[key], of, f"{prefix}{key}") for key, value in given.items()})


def _typed(value: Any, hint: Any, of: str, key: str) -> Any:
    """`value` where it is what the annotation says; a mapping becomes the dataclass named there."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{key} of {of} is {value!r}; it is a mapping")
        return _build(hint, value, of, f"{key}.")
    origin = typing.get_origin(hint) or hint
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        if key == "time":
            raise UserError(
                f"{key} of {of} is the number {value}: YAML reads 24:00:00 as seconds, so write it "
                "in quotes, time: '24:00:00'"
            )
        return str(value)  # account: 4711, memory: 0
    if not isinstance(value, origin) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} of {of} is {value!r}; it must be {_type_name(hint)}")
    if origin is list and not all(isinstance(item, str) for item in value):
        raise UserError(f"{key} of {of} is {value!r}; it must be a list of texts")
    return value


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", str: "a text", bool: "true or false", list: "a list", dict: "a mapping"}
    return names.get(typing.get_origin(hint) or hint, "a mapping")
