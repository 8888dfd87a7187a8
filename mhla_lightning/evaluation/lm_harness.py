"""Run lm-evaluation-harness on our language models.

It measures likelihoods, the perplexity of long texts, and generation with the model's state.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.tokenizers import Tokenizer
from mhla_lightning.errors import UserError, missing_extra, unknown_name
from mhla_lightning.evaluation.longbench import (
    LONGBENCH,
    LONGBENCH_TASKS,
    MISSING_PACKAGES,
    average_row,
    cuts_the_middle,
)
from mhla_lightning.inference.text import Sampling
from mhla_lightning.inference.text.continuation import continue_prompts
from mhla_lightning.inference.text.engine import pad

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(None, missing_extra("lm_eval", "lm_eval", "mhla eval lm")) from error

PAPER_TASKS = (
    "wikitext",
    "lambada_openai",
    "winogrande",
    "piqa",
    "arc_challenge",
    "openbookqa",
    "arc_easy",
    "boolq",
    "mmlu",
)
"""Tasks of the paper's zero-shot table of language models (SPEC 5.2)."""

PRESETS = {"paper": PAPER_TASKS, LONGBENCH: LONGBENCH_TASKS}
"""Name of `--tasks` -> tasks; `longbench` takes the place of the harness's group of 21 tasks."""

_DEFAULT_NEW_TOKENS = 256  # the harness's own
_GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
log = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), tokens of the context, tokens of the continuation)"""


class HarnessLM(TemplateLM):
    """A CausalLM with the interface of the harness.

    Args:
        backbone: a CausalLM in eval mode.
        tokenizer: its tokenizer; a text without context starts after the end-of-document token.
        max_length: tokens in the model at once, at least 2. A longer context loses its beginning, and in
            LongBench its middle.
        batch_size: rows in the model at once.
        seed: for tasks that sample.

    Attributes:
        shortened: number of contexts of each task that were too long to be continued whole.

    Raises:
        UserError: the tokenizer has no end-of-document token.
    """

    def __init__(
        self, backbone: Any, tokenizer: Tokenizer, max_length: int, batch_size: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        if tokenizer.end is None:
            raise UserError(
                "tokenizer",
                f"{tokenizer.name} has no end-of-document token, which the harness needs for a text "
                "without context",
            )
        self.backbone, self.text_tokenizer = backbone, tokenizer
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.shortened: Counter[str] = Counter()
        self._end = tokenizer.end
        self._device = next(backbone.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self._end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids; our tokenizers add no special tokens."""
        return self.text_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # TemplateLM's abstract method; it has no public name (lm_eval 0.4).
        results = self.score([(context, continuation) for _, context, continuation in requests])
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of whole texts.

        A text is cut into windows of `max_length` tokens, and each token is predicted once.
        """
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self._end, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.score(windows), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Score continuations after their contexts, both as token ids.

        Pairs that differ in their last token only (the letters of a multiple choice) share one row.

        Returns:
            for each pair, the sum of log p of the continuation, and whether greedy decoding would produce it.

        Raises:
            UserError: an empty context, or a continuation longer than `max_length`.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not context or len(continuation) > self.max_length:
                raise UserError(
                    "pairs",
                    f"a continuation of {len(continuation)} tokens after {len(context)} of context does "
                    "not fit the "
                    f"{self.max_length} tokens of the model",
                )
            rows.setdefault(tuple([*context, *continuation][-(self.max_length + 1) :][:-1]), []).append(
                number
            )
        results: dict[int, tuple[float, bool]] = {}
        # Similar lengths share a batch, and a batch that is too large for memory fails first.
        ordered = sorted(rows, key=len, reverse=True)
        for first in range(0, len(ordered), self.batch_size):
            batch = ordered[first : first + self.batch_size]
            tokens, _ = pad(batch, "right", self._device)
            logits = self.backbone(tokens)  # needs no mask: the padding comes after all real tokens
            for row, sequence in enumerate(batch):
                for number in rows[sequence]:
                    results[number] = _score(logits[row, : len(sequence)], pairs[number][1])
        return [results[number] for number in range(len(pairs))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to a string of `until`, the end of a document, or max_gen_toks.

        Decoding is greedy unless the task samples.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            texts |= dict(zip(numbers, self._generate([requests[n] for n in numbers]), strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        """Continue the contexts of requests that have the same settings."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].args[1], _DEFAULT_NEW_TOKENS))
        unknown = sorted(given.keys() - _GENERATION_KEYS)
        if unknown:
            raise UserError("generation_kwargs", unknown_name("key", unknown[0], _GENERATION_KEYS))
        new = min(given["max_gen_toks"], self.max_length - 1)
        prompts = [self._context(request, new) for request in requests]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
        texts = [""] * len(prompts)
        for continuation in continue_prompts(
            self.backbone,
            self.text_tokenizer,
            [prompts[number] for number in order],
            self._sampling(given),
            new,
            stops=[stop for stop in given["until"] if stop],
            batch_size=self.batch_size,
            device=self._device,
        ):
            texts[order[continuation.prompt]] += continuation.text
        return texts

    def _context(self, request: Instance, new: int) -> list[int]:
        """Return the tokens of a request's context, short enough for `new` further tokens."""
        tokens = self.tok_encode(request.args[0])
        side = "middle" if cuts_the_middle(request.task_name) else "left"
        kept, _ = maybe_truncate(tokens, new, self.max_length, side=side, verbose=False)
        self.shortened[request.task_name or ""] += len(kept) < len(tokens)
        return kept

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        if not given["do_sample"]:
            return Sampling(greedy=True)
        kept = {key: given[key] for key in ("top_k", "top_p") if given.get(key)}
        return Sampling(temperature=given.get("temperature") or 1.0, seed=self.seed, **kept)


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Score one continuation.

    Args:
        logits: (tokens, V) of the context and the continuation without its last token.
        continuation: token ids.
    """
    if not continuation:
        return 0.0, True
    target = torch.tensor(continuation, device=logits.device)
    # bfloat16 has 8 bits, too few for differences between answers.
    logits = logits[-len(continuation) :].float()
    likelihood = (
        logits.log_softmax(-1)
        .gather(-1, target[:, None])
        .sum(dtype=torch.float32 if logits.is_mps else torch.float64)
    )
    return likelihood.item(), bool((logits.argmax(-1) == target).all())


def load_tasks(names: Iterable[str], include: str | None = None) -> tuple[TaskManager, list[Any]]:
    """Load tasks and groups of the harness with their data.

    Args:
        names: of tasks, groups or PRESETS.
        include: a folder of further task files; None means none.

    Returns:
        the manager that knows all tasks, and the loaded tasks and groups.

    Raises:
        UserError: an unknown name, or data that cannot be fetched.
    """
    manager = TaskManager(include_path=include)
    wanted = [task for name in names for task in PRESETS.get(name, (name,))]
    for name in wanted:
        if name not in manager.task_index:
            raise UserError("tasks", unknown_name("task", name, similar_names(name, manager.all_tasks)))
    loaded: list[Any] = []
    for name in dict.fromkeys(wanted):
        log.info("loading %s", name)
        try:
            found = manager.load([name])
        except Exception as error:  # noqa: BLE001  datasets, its builders and the network raise errors of any type
            if isinstance(error, ImportError) and cuts_the_middle(name):
                raise UserError("tasks", MISSING_PACKAGES) from error
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UserError(
                "tasks",
                f"the data of {name} cannot be loaded ({type(error).__name__}: {reason})"
                f"{_how_to_get(manager, name)}",
            ) from error
        loaded += (
            [found["groups"][name]] if name in found.get("groups", {}) else list(found["tasks"].values())
        )
    return manager, loaded


def _how_to_get(manager: TaskManager, name: str) -> str:
    """Return how to fetch a task's data elsewhere; nothing for data that are not on the hub."""
    source = (manager.task_index[name].cfg or {}).get("dataset_path")
    if not isinstance(source, str) or source.count("/") != 1:
        return ""
    return (
        f"; where there is a network: hf download {source} --repo-type dataset --local-dir {source}; then "
        f"start mhla in the folder that holds {source}"
    )


def similar_names(name: str, names: Iterable[str], limit: int = 8) -> list[str]:
    """Return up to `limit` names that begin like `name`, since the harness has thousands."""
    known = list(names)
    return next(
        (
            found[:limit]
            for cut in range(len(name), 0, -1)
            if (found := [n for n in known if n.startswith(name[:cut])])
        ),
        known[:limit],
    )


def run_harness(
    model: HarnessLM,
    tasks: Sequence[Any],
    manager: TaskManager,
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks and return {task or group: {metric: value, `samples`: count}}.

    The last row is LongBench's average where all its tasks were run.

    Args:
        model: the model.
        tasks: of :func:`load_tasks`; so is `manager`.
        limit: samples of each task; below 1, a share of them; None means all.
        num_fewshot: examples before each question; None means the task's own number.
    """
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
        bootstrap_iters=0,
        random_seed=model.seed,
        numpy_random_seed=model.seed,
        torch_random_seed=model.seed,
        fewshot_random_seed=model.seed,
    )
    assert found is not None, "one process gathers the results"
    table: dict[str, dict[str, Any]] = {}
    for name, values in found["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float) and "_stderr" not in key
        }
        counts = found.get("n-samples", {}).get(name)
        table[name] = {**metrics, **({"samples": counts["effective"]} if counts else {})}
    return {**table, **average_row(table)}
