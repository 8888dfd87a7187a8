"""`mhla`, `mhla --help` and the help of every verb: groups, and examples that the parsers take."""

from __future__ import annotations

import re
import shlex

import pytest

from mhla_lightning.cli.main import GROUPS, VERBS, main, verb_parser

EXAMPLE = re.compile(r"^(?:Example: | +)((?:mhla|lightning) [a-z].*(?:\\\n.*)*)$", re.MULTILINE)


def test_every_verb_is_in_one_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(VERBS)


def test_without_arguments_there_is_a_welcome(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") < 10
    for line in re.findall(r"^  (mhla .*?)  ", said, re.MULTILINE):
        name, *rest = shlex.split(line)[1:]
        if name in VERBS:
            verb_parser(name)[1].parse_args(rest)


@pytest.mark.parametrize("name", VERBS)
def test_every_help_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb, whole = verb_parser(name)
    for parser in (whole, *whole.sub_verbs.values()):
        found = EXAMPLE.findall(parser.format_help())
        assert found, f"{parser.prog} --help has no example"
        for command in found:
            words = shlex.split(
                re.sub(r"   +\S.*| >.*", "", command.replace("\\\n", " "))
            )  # a remark follows
            assert words[1] == name, command
            if "--help" in words:
                continue
            try:
                _, rest = whole.parse_known_args(words[2:])
            except SystemExit:
                pytest.fail(f"{parser.prog} --help: {command}\n{capsys.readouterr().err}")
            assert not rest or getattr(verb, "TAKES_OVERRIDES", False), command
