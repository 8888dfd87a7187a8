"""Text generation: the state, batches, the distribution of tokens, stop strings."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mhla_lightning.backbones import CausalLM
from mhla_lightning.data.tokenizers import open_tokenizer
from mhla_lightning.inference.text import Sampling, Step, engine, generate
from mhla_lightning.inference.text.continuation import StopText, continue_prompts
from mhla_lightning.inference.text.sampling import sequence_keys
from tests.helpers.errors import refused
from tests.helpers.language_models import ENTRIES, entry_id, prompts, tiny_model
from tests.helpers.marks import every_nth

GREEDY = Sampling(greedy=True)
every_operator = pytest.mark.parametrize("entry", ENTRIES, ids=entry_id)


def collect(steps: Any, count: int) -> list[list[int]]:
    """The new tokens of each prompt."""
    tokens: list[list[int]] = [[] for _ in range(count)]
    for step in steps:
        for prompt, token in zip(step.prompts, step.tokens, strict=True):
            tokens[prompt].append(token)
    return tokens


def continued(
    model: CausalLM,
    given: Sequence[Sequence[int]],
    sampling: Sampling = GREEDY,
    new: int = 40,
    **options: Any,
) -> list[list[int]]:
    return collect(generate(model, given, sampling, new, **options), len(given))


@every_operator
def test_500_greedy_tokens_with_the_state_are_those_of_full_recomputation(entry: dict[str, Any]) -> None:
    model, (prompt,) = tiny_model(entry), prompts(21)
    (new,) = continued(model, [prompt], new=500)
    assert len(new) == 500
    assert len(set(new)) > 10, "a text of one token would prove nothing"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == new


@every_operator
def test_teacher_forced_logits_agree_in_float32(entry: dict[str, Any]) -> None:
    model, (tokens,) = tiny_model(entry, torch.float32), prompts(150)
    with torch.no_grad():
        whole = model(torch.tensor([tokens]))[0]
        first, state = model.prefill(torch.tensor([tokens[:37]]), all_logits=True)
        rows = [first[0]]
        for token in tokens[37:]:
            row, state = model.step(torch.tensor([token]), state)
            rows.append(row)
    assert whole.abs().max() > 1
    assert (torch.cat(rows) - whole).abs().max() <= 1e-4 * whole.abs().max()


@every_operator
@pytest.mark.parametrize("padding", every_nth(["left", "right"], 2))
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=0.7, top_k=20, top_p=0.95, seed=3)], ids=["greedy", "sampled"]
)
def test_a_batch_continues_each_prompt_as_alone(
    entry: dict[str, Any], padding: Literal["left", "right"], sampling: Sampling
) -> None:
    model, given = tiny_model(entry), prompts(3, 17, 8, 1)
    together = continued(model, given, sampling, padding=padding)
    assert together == [continued(model, [prompt], sampling)[0] for prompt in given]
    assert together == continued(model, given, sampling, padding=padding, batch_size=3)
    assert len({tuple(new) for new in together}) == len(given)


def test_a_finished_sequence_leaves_the_batch() -> None:
    model, given = tiny_model("softmax"), prompts(5, 9, 2)
    free = continued(model, given)
    end = free[1][3]
    steps = list(generate(model, given, GREEDY, 40, end=end))
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert collect(steps, 3) == expected
    assert len(expected[1]) < max(map(len, expected)), "one of them ends early"
    for before, after in zip(steps, steps[1:], strict=False):
        assert after.prompts == [prompt for prompt in before.prompts if prompt not in before.finished]
        if before.finished:
            assert after.state_bytes < before.state_bytes
    reasons = {prompt: why for step in steps for prompt, why in step.finished.items()}
    assert reasons == {
        prompt: "end" if tokens[-1] == end else "length" for prompt, tokens in enumerate(expected)
    }


def test_stop_is_told_every_token_once_and_ends_its_own_sequence() -> None:
    told: list[tuple[int, int]] = []

    def stop(prompt: int, token: int) -> bool:
        told.append((prompt, token))
        return prompt == 0 and len([p for p, _ in told if p == 0]) == 2

    new = continued(tiny_model("softmax"), prompts(4, 4), new=6, stop=stop)
    assert [len(tokens) for tokens in new] == [2, 6]
    assert sorted(told) == sorted((prompt, token) for prompt, tokens in enumerate(new) for token in tokens)


def test_an_empty_prompt_starts_from_the_end_of_a_document() -> None:
    model = tiny_model("linear")
    assert continued(model, [[], [7]], end=0, new=5) == continued(model, [[0], [7]], end=0, new=5)
    with refused("prompts"):
        generate(model, [[7], []], GREEDY, 5)


def test_tokens_beyond_the_tokenizer_are_never_chosen() -> None:
    model, given = tiny_model("softmax"), prompts(4, 6)
    free = continued(model, given)
    limit = max(max(tokens) for tokens in free)
    assert all(token < limit for tokens in continued(model, given, vocabulary=limit) for token in tokens)


@pytest.mark.parametrize(
    ("name", "options"), [("max_new_tokens", {"new": 0}), ("batch_size", {"batch_size": 0})]
)
def test_counts_below_one_are_refused(name: str, options: dict[str, Any]) -> None:
    with refused(name):
        continued(tiny_model("softmax"), prompts(2), **options)


def test_no_prompts_give_no_steps() -> None:
    steps: list[Step] = list(generate(tiny_model("softmax"), [], GREEDY, 3))
    assert steps == []


def test_sampling_and_engine_import_neither_lightning_nor_timm() -> None:
    folder = Path(engine.__file__).parent
    for name in ("__init__", "sampling", "engine"):
        imported = [
            node
            for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        modules = {str(node.module) for node in imported}
        allowed = ("mhla_lightning.errors", "mhla_lightning.randomness", "mhla_lightning.inference.text.")
        assert all(module.startswith(allowed) for module in modules if module.startswith("mhla_lightning"))


def plain(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Compute the definition with numpy and loops."""
    scores = np.exp((logits - logits.max()) / temperature)
    scores /= scores.sum()
    order = np.argsort(-scores, kind="stable")
    kept = order[: top_k or len(order)]
    scores = np.array([score if token in kept else 0 for token, score in enumerate(scores)])
    scores /= scores.sum()
    if top_p is not None:
        reached, nucleus = 0.0, []
        for token in order:
            if reached < top_p:
                nucleus.append(token)
            reached += scores[token]
        scores = np.array([score if token in nucleus else 0 for token, score in enumerate(scores)])
    return scores / scores.sum()


SETTINGS = [
    (1.0, None, None),
    (0.5, None, None),
    (2.0, 3, None),
    (1.0, None, 0.6),
    (1.3, 4, 0.7),
    (1.0, 1, None),
    (1.0, None, 1e-9),
    (1.0, 99, 1.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_probabilities_are_the_plain_ones(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 2
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    for row, expected in zip(found, logits.double().numpy(), strict=True):
        np.testing.assert_allclose(row.numpy(), plain(expected, temperature, top_k, top_p), atol=1e-12)


def test_equal_logits_keep_exactly_top_k() -> None:
    assert (Sampling(top_k=3).probabilities(torch.zeros(2, 9)) > 0).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=5), Sampling(0.8, top_k=4, top_p=0.9, seed=6)], ids=["all", "top"]
)
def test_draws_are_as_frequent_as_probable(sampling: Sampling) -> None:
    draws, logits = 20_000, torch.randn(1, 9, generator=torch.Generator().manual_seed(2))
    probabilities = sampling.probabilities(logits)[0]
    keys = [f"{number}-0" for number in range(draws)]
    tokens = sampling.choose(logits.expand(draws, -1), keys, 0)
    counts = torch.bincount(tokens, minlength=9).double()
    deviation = (draws * probabilities * (1 - probabilities)).sqrt()
    assert (counts[probabilities == 0] == 0).all()
    assert ((counts - draws * probabilities).abs() <= 4 * deviation).all()


def test_draws_depend_on_seed_key_and_position() -> None:
    logits = torch.zeros(1, 10_000)

    def draw(seed: int, key: str, position: int) -> int:
        return int(Sampling(seed=seed).choose(logits, [key], position))

    assert draw(0, "a", 0) == draw(0, "a", 0)
    assert len({draw(0, "a", 0), draw(1, "a", 0), draw(0, "b", 0), draw(0, "a", 1)}) == 4


def test_one_prompt_twice_is_continued_in_two_ways() -> None:
    (prompt,) = prompts(6)
    first, second = continued(tiny_model("softmax"), [prompt, prompt], Sampling())
    assert first != second
    assert len(set(sequence_keys([prompt, prompt, prompt[:-1]]))) == 3


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_no_numbers_are_refused(greedy: bool) -> None:
    with refused("logits"):
        Sampling(greedy=greedy).choose(torch.tensor([[0.0, float("nan")]]), ["a"], 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_sampling_out_of_range(key: str, value: Any) -> None:
    with refused(key) as error:
        Sampling(**{key: value})
    assert str(value) in str(error.value)


BYTES = open_tokenizer("bytes")


def stopped_text(text: str, stops: Sequence[str]) -> tuple[list[str], bool]:
    """Return the text of each byte of `text`, and at last the text that was held back."""
    output = StopText(BYTES, stops)
    pieces = []
    for token in BYTES.encode(text):
        pieces.append(output.push(token))
        if output.stopped:
            break
    return [*pieces, output.finish()], output.stopped


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped"),
    [
        ("one\n\ntwo", ["\n\n"], "one", True),
        ("one\ntwo", ["\n\n"], "one\ntwo", False),
        ("one\n", ["\n\n"], "one\n", False),
        ("aababac", ["abac"], "aab", True),
        ("naïve Häuser", ["ä"], "naïve H", True),
        ("stop at once", ["stop", "s"], "", True),
        ("xabcd", ["abcd", "bc"], "xa", True),
        ("no end", [], "no end", False),
        ("ends here", ["here"], "ends ", True),
    ],
)
def test_text_ends_before_a_stop_string(text: str, stops: list[str], shown: str, stopped: bool) -> None:
    pieces, found = stopped_text(text, stops)
    assert ("".join(pieces), found) == (shown, stopped)


def test_text_comes_as_soon_as_it_is_certain_and_never_half_a_character() -> None:
    pieces, _ = stopped_text("aé€b\nc", ["\n\n"])
    assert pieces == ["a", "", "é", "", "", "€", "b", "", "\nc", ""]
    assert stopped_text("b\n", ["\n\n"])[0] == ["b", "", "\n"]


def test_an_empty_stop_string_is_refused() -> None:
    with refused("stops"):
        StopText(BYTES, [""])


def test_prompts_are_continued_as_text_up_to_the_stop_string() -> None:
    model = tiny_model("linear", vocab_size=300)  # more ids than bytes
    given = [BYTES.encode(text) for text in ("one", "another")]

    def texts(stops: Sequence[str]) -> tuple[list[str], dict[int, str | None]]:
        found = ["", ""]
        why: dict[int, str | None] = {}
        for new in continue_prompts(model, BYTES, given, Sampling(seed=1), 60, stops=stops):
            found[new.prompt] += new.text
            why[new.prompt] = new.finished
        return found, why

    free, _ = texts([])
    (tokens,) = continued(model, [given[0]], Sampling(seed=1), 60, end=BYTES.end, vocabulary=BYTES.vocabulary)
    assert free[0] == BYTES.decode(tokens)
    stop = free[0][10:12]
    assert len(stop) == 2
    cut, why = texts([stop])
    assert cut[0] == free[0][: free[0].index(stop)]
    assert why[0] == "stop"
