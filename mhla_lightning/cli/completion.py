"""Print a script that lets a shell complete verbs, options and names of recipes.

A new shell reads the script from where it is written:
  mhla completion bash > ~/.local/share/bash-completion/completions/mhla
  mhla completion zsh >> ~/.zshrc
  mhla completion fish > ~/.config/fish/completions/mhla.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mhla_lightning.cli.main import VERBS, verb_parser
from mhla_lightning.cli.spelling import VerbParser
from mhla_lightning.config.recipes import recipe_names

_TAKE_RECIPES = ("run", "compare", "plan", "submit", "recipes show", "bench step")

_BASH = """\
_mhla() {{
    local words
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
        *) words="" ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words="{verbs}"; fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _mhla mhla lightning
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla completion`."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    """Print the script; return the exit code."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](), end="")
    return 0


def bash() -> str:
    """Return the script for bash."""
    words = completions()
    verbs = sorted({place.partition(" ")[0] for place in words})
    # those of two words come first: the first case that fits counts
    places = sorted(words, key=lambda place: (-place.count(" "), place))
    cases = (f"        {_pattern(place)}) words='{' '.join(words[place])}' ;;" for place in places)
    return _BASH.format(cases="\n".join(cases), verbs=" ".join(verbs))


def _pattern(place: str) -> str:
    return f'"{place}"' if " " in place else f'"{place} "*'


def zsh() -> str:
    """Return the script for zsh, which takes functions of bash."""
    return f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{bash()}"


def fish() -> str:
    """Return the script for fish."""
    lines = []
    for place, words in completions().items():
        verb, _, sub = place.partition(" ")
        seen = f"__fish_seen_subcommand_from {verb}" + (
            f"; and __fish_seen_subcommand_from {sub}" if sub else ""
        )
        options = " ".join(word for word in words if word.startswith("--"))
        names = " ".join(word for word in words if not word.startswith("--"))
        if not sub:
            lines.append(f"complete -c mhla -n __fish_use_subcommand -a {verb}")
        lines += [f"complete -c mhla -n '{seen}' -a '{given}'" for given in (options, names) if given]
    return "\n".join(lines) + "\n"


def completions() -> dict[str, list[str]]:
    """Return `verb` or `verb sub-verb` -> the words that may follow it."""
    return {place: words for verb in VERBS for place, words in _of_verb(verb)}


def _of_verb(verb: str) -> Iterator[tuple[str, list[str]]]:
    _, parser = verb_parser(verb)
    yield verb, [*parser.sub_verbs, *_options(parser), *_recipes(verb)]
    for name, below in parser.sub_verbs.items():
        place = f"{verb} {name}"
        yield place, [*_options(below), *_recipes(place)]


def _options(parser: VerbParser) -> list[str]:
    if parser.sub_verbs:
        return ["--help"]
    return sorted({text for text in parser.written().values() if text.startswith("--")} | {"--help"})


def _recipes(place: str) -> list[str]:
    return recipe_names() if place in _TAKE_RECIPES else []
