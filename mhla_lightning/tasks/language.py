"""Language modelling and associative recall (paper Sec. 5.4; SPEC 5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from mhla_lightning.attention.packing import document_lengths
from mhla_lightning.errors import UserError
from mhla_lightning.tasks.base import PREFIXES, GivesFacts, Task
from mhla_lightning.tasks.batches import Stage, entry, keys, keys_of, named, real_rows
from mhla_lightning.tasks.token_loss import IGNORE, token_loss

HOST_DOCUMENTS = "host_documents"
"""Key of a batch whose `documents` are on the host too."""


class Perplexity(MeanMetric):
    """exp of the mean loss; torchmetrics' takes logits, which are never held here."""

    def compute(self) -> Tensor:
        return super().compute().exp()


@runtime_checkable
class LanguageBackbone(Protocol):
    """What this task asks of a backbone besides the base's :class:`Backbone`."""

    vocab_size: int

    @property
    def head_weight(self) -> Tensor: ...

    def features(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor: ...


class StreamsTokens(Protocol):
    """What :meth:`LanguageTask.predict_step` asks of a backbone."""

    def prefill(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Any]: ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class LanguageLossConfig:
    """The loss of a language model: next-token cross entropy.

    Args:
        isolate_documents: no token sees another document of its row, and positions start anew with each.
            False is plain concatenation, as in the paper: a row is one text, also for the targets.
        z_loss: coefficient of logsumexp^2 in training.

    Raises:
        UserError: a negative coefficient. The key begins with `loss`, the task's argument: a recipe's parser
            builds this object before the task is there to name it.
    """

    isolate_documents: bool = True
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise UserError("loss.z_loss", f"{self.z_loss} is negative; it must be at least 0")


class LanguageTask(Task):
    """Next-token cross entropy; in validation also perplexity and bits per byte.

    Loss and metrics are means over counted targets: the next token of the same document, never padding. The
    micro batches and ranks of a batch have equal weight in the gradient, also where padding leaves one fewer
    targets. Metrics are exact over all.

    Args:
        backbone, attention, backbone_options: see :class:`Task`.
        loss: None takes the defaults.
        eval_lengths: context lengths besides the trained one at which validation rows are evaluated, cut into
            windows: `val_1024/loss` and so on. None adds none.
        task: further arguments of :class:`Task`: optimizer, schedule, init_from and so on.

    Attributes:
        token_bytes: UTF-8 bytes of every token id, which a data module of ours gives. Without them there is
            no bits_per_byte.

    Raises:
        UserError: see :class:`Task`; a backbone that is no language model, a length that the operators
            refuse.
    """

    METRICS: ClassVar[dict[str, type[MeanMetric]]] = {
        "loss": MeanMetric,
        "perplexity": Perplexity,
        "bits_per_byte": MeanMetric,
    }

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        loss: LanguageLossConfig | None = None,
        eval_lengths: list[int] | None = None,
        **task: Any,
    ) -> None:
        super().__init__(backbone, attention, backbone_options, **task)
        loss = loss or LanguageLossConfig()
        self.context = math.prod(self.grid)
        self.isolate_documents, self.z_loss = loss.isolate_documents, loss.z_loss
        self.eval_lengths = sorted({*(eval_lengths or ())} - {self.context})
        self.vocab_size = self._try_lengths()
        self.token_bytes: Tensor | None = None
        tags = [
            self._tag(prefix, length) for prefix in PREFIXES for length in (self.context, *self.eval_lengths)
        ]
        self.metrics = nn.ModuleDict(
            {tag: nn.ModuleDict({name: kind() for name, kind in self.METRICS.items()}) for tag in tags}
        )

    def setup(self, stage: str) -> None:
        """Take the bytes of every token from the data module; Lightning calls it."""
        super().setup(stage)
        data = cast(Any, self.trainer).datamodule
        if isinstance(data, GivesFacts):
            found = data.facts().get("token_bytes")
            self.token_bytes = None if found is None else torch.as_tensor(found)

    def _try_lengths(self) -> int:
        """Run the model without weights at every length; return the vocabulary's size.

        An operator that refuses a length then does it before training.
        """
        with torch.device("meta"):
            plan = self._build()
            if not isinstance(plan, LanguageBackbone):
                raise UserError(
                    "backbone", f"'{self.backbone_name}' is no language model; take lm_340m or lm_tiny"
                )
            for length in (self.context, *self.eval_lengths):
                key = "eval_lengths" if length in self.eval_lengths else "backbone_options.context"
                if length < 2:
                    raise UserError(key, f"{length} tokens have no next token; take at least 2")
                try:
                    plan.features(torch.empty(1, length, dtype=torch.int64))
                except UserError as error:
                    raise UserError(key, f"the model refuses rows of {length} tokens ({error})") from error
        return plan.vocab_size

    def forward(self, tokens: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Return logits (batch, tokens, vocabulary)."""
        return self.built_backbone()(tokens, mask, documents)

    def targets(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Return the token after each token, (batch, tokens) int64; IGNORE does not count."""
        counted = documents[:, 1:] >= 0
        counted &= documents[:, :-1] == documents[:, 1:] if self.isolate_documents else documents[:, :-1] >= 0
        return F.pad(tokens[:, 1:].masked_fill(~counted, IGNORE), (0, 1), value=IGNORE)

    def entries(self, batch: Any, stage: Stage) -> dict[str, Any]:
        """Return tokens and documents of `input_ids`, `attention_mask` and `labels`.

        They mean what transformers means: labels are those of the same token, the loss compares each with
        the token before, and -100 does not count. Without labels every real token counts.

        Raises UserError where they do not fit this model.
        """
        found = named(batch, ("input_ids",))
        if "position_ids" in found:
            raise UserError("batch.position_ids", "positions follow from attention_mask; leave them out")
        name = "tokens" if "tokens" in found else "input_ids"
        tokens = entry(found, name, (None, None), "int64", "token ids (batch, tokens)")
        rows, length = tokens.shape
        if length < 2 or (length > self.context and (length % self.context or stage == "train")):
            raise UserError(
                f"batch.{name}", f"its rows hold {length} tokens; they must hold from 2 to {self.context}"
            )
        self.label_checks.within(tokens, self.vocab_size, "backbone_options.vocab_size")
        if "documents" not in found:
            mask = found.get("attention_mask")
            mask = torch.ones_like(tokens) if mask is None else mask
            if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
                raise UserError("batch.attention_mask", f"it must have the shape of {name}, {(rows, length)}")
            found["documents"] = torch.zeros_like(tokens).masked_fill(mask == 0, -1)
        if "labels" in found:
            labels = entry(found, "labels", (rows, length), "int64", "token ids, or -100")
            self.label_checks.within(labels, self.vocab_size, "backbone_options.vocab_size", IGNORE)
        return found | {"tokens": tokens}

    def _wanted(self, tokens: Tensor, documents: Tensor, labels: Tensor | None) -> Tensor:
        """Return the targets, of labels where the batch has them."""
        if labels is None:
            return self.targets(tokens, documents)
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.completed(batch, batch_idx, "train")
        tokens, documents = batch["tokens"], batch["documents"]
        features = self._features(tokens, documents, batch.get(HOST_DOCUMENTS, documents))
        targets = self._wanted(tokens, documents, batch.get("labels"))
        return token_loss(features, self._model().head_weight, targets, z_loss=self.z_loss)

    def evaluate(self, batch: Mapping[str, Tensor], prefix: str) -> None:
        """Add a batch to the metrics under a prefix (one of PREFIXES) at every context length.

        Rows of weight 0 do not count.
        """
        row = batch["tokens"].shape[1]
        host = batch.get(HOST_DOCUMENTS, batch["documents"])
        # Rows of other loaders may be shorter than the context.
        windows = {self.context: min(row, self.context)} | {n: n for n in self.eval_lengths if row % n == 0}
        for tagged, length in windows.items():
            tokens, documents = (batch[key].reshape(-1, length) for key in ("tokens", "documents"))
            labels = batch["labels"].reshape(-1, length) if "labels" in batch else None
            real = (batch["weight"] > 0).repeat_interleave(row // length)
            targets = self._wanted(tokens, documents, labels).masked_fill(~real[:, None], IGNORE)
            tag = self._tag(prefix, tagged)
            metrics = cast("dict[str, MeanMetric]", self.metrics[tag])
            self.measure(metrics, self._features(tokens, documents, host.reshape(-1, length)), targets)
            for name, metric in metrics.items():
                if name != "bits_per_byte" or self.token_bytes is not None:
                    self.log(
                        f"{tag}/{name}",
                        metric,
                        prog_bar=tag == "val" and name == "loss",
                        batch_size=len(tokens),
                    )

    def run_backbone(self, batch: Mapping[str, Tensor]) -> None:
        """Run the backbone on the first `context` tokens of every row."""
        host = batch.get(HOST_DOCUMENTS, batch["documents"])
        tokens, documents, host = (x[:, : self.context] for x in (batch["tokens"], batch["documents"], host))
        self._features(tokens, documents, host)

    def measure(self, metrics: Mapping[str, MeanMetric], features: Tensor, targets: Tensor) -> None:
        """Add the counted targets of a batch to the metrics of one context length."""
        counted = targets != IGNORE
        count = counted.sum()
        nats = token_loss(features, self._model().head_weight, targets, total=True)
        metrics["loss"].update(nats / count.clamp_min(1), weight=count)
        metrics["perplexity"].update(nats / count.clamp_min(1), weight=count)
        if self.token_bytes is not None:
            length = self.token_bytes.to(targets.device)[targets[counted]].sum()
            metrics["bits_per_byte"].update(nats / (math.log(2) * length.clamp_min(1)), weight=length)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Continue the first half of every row, to its end, with the likeliest tokens.

        Where documents are isolated, only the last document of that half is read.

        Returns:
            `key`; `prompt`, `continuation` int64 (rows, tokens); `read` bool, the tokens of the prompt that
            are read.
        """
        batch = self.completed(batch, batch_idx, "predict")
        kept = real_rows(batch)
        length = min(batch["tokens"].shape[1], self.context)
        prompt, documents = (batch[name][kept, : length // 2] for name in ("tokens", "documents"))
        read = documents >= 0
        if self.isolate_documents:
            read &= documents == documents.amax(1, keepdim=True)
        # A model may have more ids than its tokenizer.
        known = self.vocab_size if self.token_bytes is None else len(self.token_bytes)
        model = cast(StreamsTokens, self.built_backbone())
        logits, state = model.prefill(prompt, read)
        chosen = [logits[:, :known].argmax(-1)]
        while length // 2 + len(chosen) < length:
            logits, state = model.step(chosen[-1], state)
            chosen.append(logits[:, :known].argmax(-1))
        continuation = torch.stack(chosen, 1)
        return {"key": keys_of(batch, kept), "prompt": prompt, "read": read, "continuation": continuation}

    def example_batch(self, samples: int) -> dict[str, Tensor]:
        """Return rows of four documents of unequal lengths.

        Where documents are not isolated a row is one document.
        """
        tokens = torch.zeros(samples, self.context, dtype=torch.int64)
        ends = torch.tensor([self.context * share // 100 for share in (7, 31, 58)])
        documents = torch.bucketize(torch.arange(self.context), ends, right=True).expand_as(tokens)
        return {
            "tokens": tokens,
            "documents": documents if self.isolate_documents else torch.zeros_like(tokens),
            **keys(samples),
        }

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuse data that this model cannot take, before training.

        Raises:
            UserError: no tokens, a larger vocabulary, rows of another length, validation rows that the
                context
                lengths do not divide.
        """
        if facts["kind"] != "tokens":
            raise UserError(None, f"a language model needs tokens, and the data holds {facts['kind']}")
        vocabulary, length = facts.get("vocabulary"), facts["length"]
        if vocabulary is not None and vocabulary > self.vocab_size:
            raise UserError(
                "backbone_options.vocab_size",
                f"it is {self.vocab_size} and the data has {vocabulary} token ids; set it to {vocabulary} or "
                "more",
            )
        if length != self.context:
            raise UserError(
                "backbone_options.context",
                f"it is {self.context} and the data's rows hold {length} tokens; they must be equal",
            )
        val_length = facts.get("val_length") or length
        for window in (self.context, *self.eval_lengths):
            if val_length % window:
                raise UserError(
                    "eval_lengths",
                    f"validation rows of {val_length} tokens do not divide into windows of {window}; "
                    "`data.text.val_length` must be a multiple of `model.backbone_options.context` and of "
                    "every length here",
                )

    def _model(self) -> LanguageBackbone:
        return cast(LanguageBackbone, self.backbone)

    def kept_on_host(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a copy of the documents, whose layout decides what the device computes."""
        return {HOST_DOCUMENTS: batch["documents"]} if "documents" in batch else {}

    def _features(self, tokens: Tensor, documents: Tensor, host: Tensor) -> Tensor:
        """Return the features, with mask and documents only where they change a number.

        No token sees padding on its right, and one document a row needs no isolation.

        Args:
            tokens, documents: (batch, tokens).
            host: the documents on the host, so that nothing waits for the device.
        """
        padded = host < 0
        borders = (host[:, 1:] != host[:, :-1]) & ~padded[:, 1:] & ~padded[:, :-1]
        isolate = self.isolate_documents and bool(borders.any())
        if not isolate and not padded[:, 0].any():
            return self._model().features(tokens)
        lengths = document_lengths(~padded, host if isolate else None)
        return self._model().features(tokens, documents >= 0, documents if isolate else None, lengths)

    def _tag(self, prefix: str, length: int) -> str:
        """Return the prefix of a length's metrics: `val` of the trained one, `val_1024` of another."""
        return f"{prefix}_{length}" if length in self.eval_lengths else prefix


class RecallTask(LanguageTask):
    """Multi-query associative recall (arXiv 2312.04927).

    Only the token after a key counts that the row has shown before. Keys are the lower half of the
    vocabulary. Validation logs `accuracy` beside the loss. Arguments as :class:`LanguageTask`.
    """

    METRICS = LanguageTask.METRICS | {"accuracy": MeanMetric}

    def targets(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Return the next tokens that answer a repeated key, IGNORE elsewhere."""
        query = (tokens < self.vocab_size // 2) & seen_before(tokens)
        return super().targets(tokens, documents).masked_fill(~query, IGNORE)

    def measure(self, metrics: Mapping[str, MeanMetric], features: Tensor, targets: Tensor) -> None:
        super().measure(metrics, features, targets)
        counted = targets != IGNORE
        guesses = F.linear(features[counted], self._model().head_weight).argmax(-1)
        hits = (guesses == targets[counted]).float()
        metrics["accuracy"].update(hits.sum() / max(1, len(hits)), weight=len(hits))

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuse data as :class:`LanguageTask` does, and another size of the vocabulary.

        Model and data must agree on the half that are keys. Raises UserError.
        """
        super().check_data(facts, micro_batch)
        vocabulary = facts.get("vocabulary")
        if vocabulary not in (None, self.vocab_size):
            raise UserError(
                "backbone_options.vocab_size",
                f"it is {self.vocab_size} and the data has {vocabulary} token ids; recall needs them equal",
            )


def seen_before(tokens: Tensor) -> Tensor:
    """Return (batch, tokens) bool: whether the same token occurs earlier in the row."""
    values, order = tokens.sort(dim=1, stable=True)
    repeated = F.pad(values[:, 1:] == values[:, :-1], (1, 0), value=False)
    return torch.zeros_like(repeated).scatter_(1, order, repeated)
