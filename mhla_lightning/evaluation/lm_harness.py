"""lm-evaluation-harness on our language models: likelihoods, perplexity of long texts, generation with the
state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.tokenizers import Tokenizer
from mhla_lightning.errors import UserError, missing_extra, unknown_name
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
    raise UserError(missing_extra("lm_eval", "lm_eval", "mhla eval lm")) from error

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
"""The paper's zero-shot table of language models (SPEC 5.2)."""

_DEFAULT_NEW_TOKENS = 256  # the harness's own
_GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
log = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), tokens of the context, tokens of the continuation)"""


class HarnessLM(TemplateLM):
    """A CausalLM behind the harness's interface.

    Args:
        backbone: a CausalLM in eval mode.
        tokenizer: its tokenizer; the end of a document stands before what has no context.
        max_length: tokens that the model sees at once, at least 2; longer contexts lose their beginning.
        batch_size: rows in the model at once.
        seed: of tasks that sample.

    Raises:
        UserError: a tokenizer without an end of a document.
    """

    def __init__(
        self, backbone: Any, tokenizer: Tokenizer, max_length: int, batch_size: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        if tokenizer.end is None:
            raise UserError(
                f"the tokenizer {tokenizer.name} has no end of a document, and the harness needs it "
                "where a text has no context"
            )
        self.backbone, self.text_tokenizer, self.max_length, self.batch_size, self.seed = (
            backbone,
            tokenizer,
            max_length,
            batch_size,
            seed,
        )
        self._end = tokenizer.end
        self._device = next(backbone.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self._end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; our tokenizers add no special tokens."""
        return self.text_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = self.score([(context, continuation) for _, context, continuation in requests])
        for (pair, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of whole texts, in windows of `max_length` of which each token is predicted
        once.
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
        """(sum of log p of the continuation, whether greedy decoding would give it) of each (context,
        continuation) in tokens.

        Pairs of the same tokens but the last (the letters of a multiple choice) share one row.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not context or len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit behind its context "
                    f"in the {self.max_length} of the model"
                )
            rows.setdefault(tuple([*context, *continuation][-(self.max_length + 1) :][:-1]), []).append(
                number
            )
        results: dict[int, tuple[float, bool]] = {}
        ordered = sorted(
            rows, key=len, reverse=True
        )  # like lengths together, and a batch that is too large for memory fails first
        for first in range(0, len(ordered), self.batch_size):
            batch = ordered[first : first + self.batch_size]
            tokens, _ = pad(batch, "right", self._device)
            logits = self.backbone(tokens)  # no mask: no token sees what stands right of it
            for row, sequence in enumerate(batch):
                for number in rows[sequence]:
                    results[number] = _score(logits[row, : len(sequence)], pairs[number][1])
        return [results[number] for number in range(len(pairs))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of `until`, the end of a document, or max_gen_toks; greedy unless
        the task samples.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            chosen = [requests[number].args for number in numbers]
            texts |= dict(
                zip(numbers, self._generate([context for context, _ in chosen], chosen[0][1]), strict=True)
            )
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, _DEFAULT_NEW_TOKENS))
        unknown = sorted(given.keys() - _GENERATION_KEYS)
        if unknown:
            raise UserError(unknown_name("generation_kwargs key", unknown[0], _GENERATION_KEYS))
        new = min(given["max_gen_toks"], self.max_length - 1)
        prompts = [
            maybe_truncate(self.tok_encode(context), new, self.max_length, verbose=False)[0]
            for context in contexts
        ]
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

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        if not given["do_sample"]:
            return Sampling(greedy=True)
        kept = {key: given[key] for key in ("top_k", "top_p") if given.get(key)}
        return Sampling(temperature=given.get("temperature") or 1.0, seed=self.seed, **kept)


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """logits: (tokens, V) of context and continuation without its last token."""
    if not continuation:
        return 0.0, True
    target = torch.tensor(continuation, device=logits.device)
    logits = logits[
        -len(continuation) :
    ].float()  # bfloat16 has 8 bits, too few for differences between answers
    likelihood = (
        logits.log_softmax(-1)
        .gather(-1, target[:, None])
        .sum(dtype=torch.float32 if logits.is_mps else torch.float64)
    )
    return likelihood.item(), bool((logits.argmax(-1) == target).all())


def load_tasks(names: Iterable[str], include: str | None = None) -> tuple[TaskManager, list[Any]]:
    """The harness's tasks and groups of these names, `paper` for the paper's nine, with their data; and what
    else knows them.

    Args:
        include: a folder of further task files.

    Raises:
        UserError: an unknown name, or data that cannot be fetched.
    """
    manager = TaskManager(include_path=include)
    wanted = [task for name in names for task in (PAPER_TASKS if name == "paper" else (name,))]
    for name in wanted:
        if name not in manager.task_index:
            raise UserError(unknown_name("task", name, near(name, manager.all_tasks)))
    loaded: list[Any] = []
    for name in dict.fromkeys(wanted):
        log.info("loading %s", name)
        try:
            found = manager.load([name])
        except Exception as error:  # noqa: BLE001  of datasets, its builders and the network
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UserError(
                f"the data of the task {name} cannot be loaded ({type(error).__name__}: {reason})"
            ) from error
        loaded += (
            [found["groups"][name]] if name in found.get("groups", {}) else list(found["tasks"].values())
        )
    return manager, loaded


def near(name: str, names: Iterable[str], limit: int = 8) -> list[str]:
    """The names that begin like `name`; the harness has thousands."""
    known = list(names)
    return next(
        (
            found[:limit]
            for cut in range(len(name), 0, -1)
            if (found := [n for n in known if n.startswith(name[:cut])])
        ),
        known[:limit],
    )


def evaluate(
    model: HarnessLM,
    tasks: Sequence[Any],
    manager: TaskManager,
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """task or group -> {metric: value, `samples`: count} as the harness computes them.

    limit: samples of each task, below 1 a share. num_fewshot: examples before each question; None is the
        task's own.
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
    return table
