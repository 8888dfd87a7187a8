"""Python, packages, plugins and commands.

Reads metadata only: nothing that is checked gets imported, except plugins.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

from mhla_lightning import __version__
from mhla_lightning.cli.doctor.finding import Finding
from mhla_lightning.errors import UserError
from mhla_lightning.plugins import load_plugins
from mhla_lightning.plugins import plugins as installed_plugins

PACKAGE = "mhla-lightning"
OLDEST_PYTHON = (3, 11)
# Releases on PyPI that carried a credential stealer (GHSA-w37p-236h-pfx3).
COMPROMISED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
# extra -> packages that it brings
EXTRAS = {
    "demo": ["mlxtend"],
    "diffusion": ["diffusers"],
    "video": ["av"],
    "language": ["tokenizers", "transformers", "datasets", "pyarrow", "zstandard"],
    "lm_eval": ["lm_eval"],
    "fla": ["flash-linear-attention"],
}


def installed(package: str) -> str | None:
    """Version of a distribution; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python() -> Finding:
    """Python is new enough."""
    text = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("fail", f"{text}; mhla-lightning needs at least {'.'.join(map(str, OLDEST_PYTHON))}")
    return Finding("ok", text)


def packages() -> Finding:
    """Every core dependency is there, in the range that pyproject.toml asks for."""
    try:
        wanted = requires(PACKAGE) or []
    except PackageNotFoundError:
        return Finding(
            "warn",
            f"{PACKAGE} {__version__} runs from a folder and is not installed, so versions cannot be "
            "compared; pip install -e .",
        )
    return compare_versions(wanted)


def compare_versions(wanted: Iterable[str]) -> Finding:
    """Compare requirement lines with the installed packages.

    A missing package fails, another version warns. Optional ones do not count.
    """
    from packaging.requirements import Requirement

    core = [r for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {r.name: installed(r.name) for r in core}
    missing = [name for name, number in found.items() if number is None]
    wrong = [
        f"{r.name} {number} (needs {r.specifier})"
        for r in core
        if (number := found[r.name]) and not r.specifier.contains(number, prereleases=True)
    ]
    if missing:
        return Finding("fail", f"not installed: {', '.join(missing)}; pip install {PACKAGE}")
    if wrong:
        return Finding(
            "warn",
            f"outside the range that mhla-lightning asks for: {', '.join(wrong)}; pip install -U {PACKAGE}",
        )
    return Finding(
        "ok", ", ".join(f"{name} {number}" for name, number in {PACKAGE: __version__, **found}.items())
    )


def compromised() -> Finding:
    """No release that is known to steal credentials."""
    found = [f"{name} {number}" for name, bad in COMPROMISED.items() if (number := installed(name)) in bad]
    if found:
        advice = (
            "uninstall, change every credential that this machine holds, then pip install 'lightning>=2.6.6'"
        )
        return Finding(
            "fail", f"{' and '.join(found)} carries a credential stealer (GHSA-w37p-236h-pfx3): {advice}"
        )
    return Finding(
        "ok",
        f"none of {', '.join(f'{name} {number}' for name, bad in COMPROMISED.items() for number in bad)}",
    )


def extras() -> Finding:
    """Which optional parts are there; none is needed by every recipe."""
    parts = []
    for extra, names in EXTRAS.items():
        found = [f"{name} {number}" for name in names if (number := installed(name))]
        parts.append(f"{extra}: {', '.join(found) if len(found) == len(names) else 'not installed'}")
    return Finding("ok", f"{'; '.join(parts)} (pip install 'mhla-lightning[NAME]')")


def mhla_command() -> Finding:
    """`mhla` on PATH is the one of this installation."""
    return command_here("mhla", shutil.which("mhla"), _script_folders())


def command_here(name: str, found: str | None, folders: Iterable[Path]) -> Finding:
    """Whether a command that PATH leads to lies in a script folder of this Python."""
    fallback = f"{sys.executable} -m mhla_lightning always works"
    if found is None:
        return Finding("warn", f"{name} is not on PATH; activate this environment ({sys.prefix}); {fallback}")
    if Path(found).parent.resolve() not in [folder.resolve() for folder in folders]:
        return Finding(
            "warn",
            f"{found} comes first on PATH and belongs to another Python than {sys.executable}; {fallback}",
        )
    return Finding("ok", found)


def lightning_command() -> Finding:
    """Check that `lightning` on PATH is ours.

    The last installed of the packages that bring a script of this name owns it.
    """
    found = shutil.which("lightning")
    here = command_here("lightning", found, _script_folders())
    if found is None or here.status != "ok":
        return here
    claims = {
        point.dist.name: point.value
        for point in entry_points(group="console_scripts", name="lightning")
        if point.dist is not None
    }
    return lightning_owner(found, Path(found).read_text(encoding="utf-8", errors="replace"), claims)


def lightning_owner(path: str, script: str, claims: Mapping[str, str]) -> Finding:
    """Who wrote the script `lightning`.

    Args:
        path: of the script.
        script: its text; it imports the module of the package that wrote it.
        claims: distribution -> `module:function` of each installed one with a script of this name.
    """
    owner = next((name for name, target in claims.items() if target.partition(":")[0] in script), None)
    others = [name for name in claims if name != PACKAGE]
    if owner == PACKAGE:
        more = f"; {others[0]} is installed too, verbs other than run are passed on to it" if others else ""
        return Finding("ok", f"{path} belongs to {PACKAGE}{more}")
    fix = f"`mhla run` always works; pip install --force-reinstall --no-deps {PACKAGE} takes the name back"
    return Finding(
        "warn",
        f"{path} belongs to {owner or 'a package that is not known here'}, so `lightning run` is not "
        f"ours; {fix}",
    )


def _script_folders() -> list[Path]:
    schemes = {sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")}
    return [Path(sysconfig.get_path("scripts", scheme)) for scheme in schemes]


def plugins() -> Finding:
    """The installed plugins, and whether they can be imported."""
    found = installed_plugins()
    if not found:
        return Finding("ok", "none installed (entry points of the group mhla_lightning.plugins)")
    listed = ", ".join(f"{one.name} ({one.module}, {one.package})" for one in found)
    before = _registered()
    try:
        load_plugins()
    except UserError as error:
        return Finding("fail", f"{listed}; {error}")
    added = [name for name in _registered() if name not in before]
    return Finding("ok", f"{listed}" + (f"; they add {', '.join(added)}" if added else ""))


def _registered() -> list[str]:
    """Return the names in the registries of operators and backbones, with their kinds."""
    from mhla_lightning.attention import ATTENTION, CAUSAL_ATTENTION
    from mhla_lightning.backbones import BACKBONES

    tables: dict[str, Mapping[str, object]] = {
        "attention": ATTENTION,
        "causal attention": CAUSAL_ATTENTION,
        "backbone": BACKBONES,
    }
    return [f"{kind} '{name}'" for kind, table in tables.items() for name in table]
