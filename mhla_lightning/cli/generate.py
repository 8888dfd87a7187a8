"""Continues prompts with the language model of a run.

A single prompt is printed to the terminal as it grows; several are continued together, each printed at its
end:
  mhla generate RUN --prompt 'def main(' --max-new-tokens 100 --temperature 0.8
  mhla generate RUN --prompts prompts.jsonl --greedy --json continued.json
The same seed continues a prompt in the same way, alone or among others.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.language_run import add_run_arguments, demand_at_least_one, find, load
from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.errors import UserError
from mhla_lightning.textfiles import NotText, is_json, json_rows, read_text, split_lines

if TYPE_CHECKING:
    from mhla_lightning.inference.loading import LanguageRun
    from mhla_lightning.inference.text import Sampling
    from mhla_lightning.inference.text.continuation import Continuation

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla generate`."""
    add_run_arguments(parser)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="text to continue; may be given several times (default: none)",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt per line, or .jsonl with the key prompt"
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=200,
        help="new tokens of each prompt at most (default: 200)",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", metavar="T", type=float, help="divides the logits (default: 1)")
    parser.add_argument("--top-k", metavar="K", type=int, help="choose among the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="choose among the fewest likeliest tokens whose probabilities sum to P",
    )
    parser.add_argument("--seed", metavar="S", type=int, help="of the random choices (default: 0)")
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text; may be given several times",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=16, help="prompts continued together (default: 16)"
    )
    parser.add_argument(
        "--cuda-graph",
        choices=("auto", "on", "off"),
        default="auto",
        help="run a whole token as one CUDA graph: auto where all layers can, on demands it (default: auto)",
    )
    parser.add_argument("--json", metavar="FILE", help="write prompts and continuations as JSON too")


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    done = perform(args, _show)
    found, output = done.found, done.output
    average = "averaged" if found.averaged else "raw"
    summary = {
        "run": found.run.run_id,
        "checkpoint": found.checkpoint.name,
        "weights": average,
        **output.summary(),
    }
    print(
        f"{summary['tokens']} tokens, {summary['tokens_per_second']:.1f} tokens/s, state of all "
        f"prompts {summary['state_bytes']:,} bytes,",
        end=" ",
        file=sys.stderr,
    )
    print(f"{average} weights of {found.run.run_id} {found.checkpoint.name}", file=sys.stderr)
    write_json(args.json, {"rows": output.rows(), "summary": summary})
    return _INTERRUPTED if done.interrupted else 0


def perform(args: argparse.Namespace, show: Callable[[Output, Iterable[Continuation]], bool]) -> Generated:
    """Continue the prompts.

    Args:
        args: of the verb.
        show: takes every continuation into the output, and returns whether it was interrupted.

    Raises:
        UserError: an argument, the run or the prompts are wrong.
    """
    demand_at_least_one(args, "max_new_tokens", "batch_size")
    check_json(args.json)
    if "" in args.stop:
        raise UserError(
            "stop", "an empty text would stop before the first token; give only texts with characters"
        )
    prompts = _prompts(args)
    sampling = _sampling(args)
    found, device = find(args)
    ids = _encode(found, prompts, args.max_new_tokens)
    backbone = load(args, found, device)
    from mhla_lightning.inference.text import Execution
    from mhla_lightning.inference.text.continuation import continue_prompts

    output = Output(prompts, started=time.perf_counter())
    steps = continue_prompts(
        backbone,
        found.tokenizer,
        ids,
        sampling,
        args.max_new_tokens,
        stops=args.stop,
        batch_size=args.batch_size,
        device=Execution(device, args.cuda_graph),
    )
    return Generated(found, output, interrupted=show(output, steps))


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = [*args.prompt, *(_read(Path(args.prompts)) if args.prompts else [])] or [""]
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # Python passes bytes that are no UTF-8 as surrogates
            key = "prompt" if number <= len(args.prompt) else "prompts"
            raise UserError(key, f"prompt {number} is no UTF-8 text") from error
    return prompts


def _read(path: Path) -> list[str]:
    text = read_text(path, "prompts")
    try:
        rows = list(json_rows(text)) if is_json(path) else []
    except NotText as error:
        raise UserError("prompts", f"{path}: {error}") from error
    found = [_prompt_of(row, path, number) for number, (_, row) in enumerate(rows, 1)]
    if not is_json(path):
        found = [line for line in split_lines(text) if line.strip()]
    if not found:
        raise UserError("prompts", f"{path} holds no prompt; write one per line")
    return found


def _prompt_of(row: Any, path: Path, number: int) -> str:
    try:
        prompt = row["prompt"]
    except (KeyError, TypeError) as error:
        raise UserError(
            "prompts", f"prompt {number} of {path} is no JSON object with the key 'prompt'"
        ) from error
    if not isinstance(prompt, str):
        raise UserError(
            "prompts", f"prompt {number} of {path} is {type(prompt).__name__}; it must be a string"
        )
    return prompt


def _sampling(args: argparse.Namespace) -> Sampling:
    from mhla_lightning.inference.text import Sampling

    given = {
        name: getattr(args, name)
        for name in ("temperature", "top_k", "top_p", "seed")
        if getattr(args, name) is not None
    }
    if args.greedy and given:
        names = ", ".join(f"`{name}`" for name in given)
        raise UserError("greedy", f"uses no random choice and excludes {names}; leave one of them out")
    return Sampling(greedy=args.greedy, **given)


def _encode(found: LanguageRun, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Encode the prompts and check that the model takes their length."""
    from mhla_lightning.inference.loading import check_length
    from mhla_lightning.inference.text.engine import start_tokens

    ids = start_tokens([found.tokenizer.encode(prompt) for prompt in prompts], found.tokenizer.end)
    check_length(found, max(map(len, ids)) + max_new_tokens - 1)  # the last new token is no input
    return ids


@dataclass
class Output:
    """The continuations so far, and their counts."""

    prompts: list[str]
    started: float
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    state_bytes: int = 0
    seconds: float = 0.0

    def take(self, new: Continuation) -> None:
        self.texts[new.prompt] = self.texts.get(new.prompt, "") + new.text
        self.tokens[new.prompt] = self.tokens.get(new.prompt, 0) + 1
        if new.finished:
            self.finished[new.prompt] = new.finished
        self.state_bytes = max(self.state_bytes, new.state_bytes)
        self.seconds = time.perf_counter() - self.started

    def summary(self) -> dict[str, Any]:
        tokens = sum(self.tokens.values())
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if tokens else 0.0,
            "state_bytes": self.state_bytes,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each prompt that was begun."""
        return [
            {
                "prompt": self.prompts[n],
                "text": text,
                "tokens": self.tokens[n],
                "finished": self.finished.get(n, "interrupted"),
            }
            for n, text in sorted(self.texts.items())
        ]


@dataclass(frozen=True)
class Generated:
    """A finished or interrupted generation.

    Args:
        found: the run.
        output: its continuations.
        interrupted: by Ctrl-C.
    """

    found: LanguageRun
    output: Output
    interrupted: bool


def _show(output: Output, steps: Iterable[Continuation]) -> bool:
    """Print continuations as they come; return whether Ctrl-C stopped them."""
    show = _stream if len(output.prompts) == 1 else _print_each
    try:
        show(output, steps)
    except KeyboardInterrupt:
        print(flush=True)
        return True
    return False


def _stream(output: Output, steps: Iterable[Continuation]) -> None:
    print(output.prompts[0], end="", flush=True)
    for new in steps:
        output.take(new)
        print(new.text, end="", flush=True)
    print(flush=True)


def _print_each(output: Output, steps: Iterable[Continuation]) -> None:
    from rich.console import Console

    total = len(output.prompts)
    with Console(stderr=True).status(f"0 of {total} prompts") as status:
        for new in steps:
            output.take(new)
            if new.finished:
                status.stop()  # while it runs, rich redirects stdout, even if that is a file
                print(
                    f"[{new.prompt + 1}/{total}] {output.prompts[new.prompt]}{output.texts[new.prompt]}",
                    flush=True,
                )
                status.start()
            status.update(f"{len(output.finished)} of {total} prompts, {sum(output.tokens.values())} tokens")
