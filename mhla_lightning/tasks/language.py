"""Language modelling and associative recall (paper Sec. 5.4; SPEC 5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from mhla_lightning.errors import UserError
from mhla_lightning.tasks.base import PREFIXES, Task, keys
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig
from mhla_lightning.tasks.token_loss import IGNORE, token_loss


class Perplexity(MeanMetric):
    """exp of the mean loss. torchmetrics' takes logits, which nobody holds here."""

    def compute(self) -> Tensor:
        return super().compute().exp()


@runtime_checkable
class LanguageBackbone(Protocol):
    """What this task asks of a backbone besides tasks.base's."""

    vocab_size: int

    @property
    def head_weight(self) -> Tensor: ...

    def features(
        self, tokens: Tensor, mask: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor: ...


class LanguageTask(Task):
    """Next-token cross entropy; in validation also perplexity and bits per byte.

    Loss and metrics are means over counted targets: the next token of the same document, never padding. Of a
    batch of several micro batches or ranks each counts alike in the gradient, also where padding leaves it
    fewer targets; metrics are exact over all.

    Args:
        backbone, attention, backbone_options, optimizer, schedule, init_from, train_only,
        checkpoint_activations: see :class:`Task`.
        isolate_documents: no token sees another document of its row, and positions start anew with each.
            False is plain concatenation, as in the
            paper: a row is one text, also for the targets.
        z_loss: coefficient of logsumexp^2 in training.
        eval_lengths: context lengths besides the trained one at which validation rows are evaluated, cut into
            windows: `val_1024/loss` and so on.

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
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        isolate_documents: bool = True,
        z_loss: float = 0.0,
        eval_lengths: list[int] | None = None,
        init_from: str | None = None,
        train_only: list[str] | None = None,
        checkpoint_activations: Literal["none", "blocks"] = "none",
    ) -> None:
        super().__init__(
            backbone,
            attention,
            backbone_options,
            optimizer,
            schedule,
            init_from,
            train_only,
            checkpoint_activations,
        )
        if z_loss < 0:
            raise UserError(f"model.z_loss is {z_loss}; it cannot be negative")
        self.context = math.prod(self.grid)
        self.isolate_documents, self.z_loss = isolate_documents, z_loss
        self.eval_lengths = sorted({*(eval_lengths or ())} - {self.context})
        self.vocab_size = self._try_lengths()
        self.token_bytes: Tensor | None = None
        tags = [
            self._tag(prefix, length) for prefix in PREFIXES for length in (self.context, *self.eval_lengths)
        ]
        self.metrics = nn.ModuleDict(
            {tag: nn.ModuleDict({name: kind() for name, kind in self.METRICS.items()}) for tag in tags}
        )

    def _try_lengths(self) -> int:
        """Runs the model without weights at every length, so that an operator that refuses one does it
        now; returns the vocabulary's size.
        """
        with torch.device("meta"):
            plan = self._build()
            if not isinstance(plan, LanguageBackbone):
                raise UserError(
                    f"backbone '{self.backbone_name}' is no language model; take lm_340m or lm_tiny"
                )
            for length in (self.context, *self.eval_lengths):
                if length < 2:
                    raise UserError(
                        f"a context of {length} tokens has no next token; model.eval_lengths and "
                        "context are at least 2"
                    )
                plan.features(torch.empty(1, length, dtype=torch.int64))
        return plan.vocab_size

    def forward(self, tokens: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits (batch, tokens, vocabulary)."""
        assert self.backbone is not None, "configure_model has not run"
        return self.backbone(tokens, mask, documents)

    def targets(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """(batch, tokens) int64: what follows each token, IGNORE where that counts nowhere."""
        counted = documents[:, 1:] >= 0
        counted &= documents[:, :-1] == documents[:, 1:] if self.isolate_documents else documents[:, :-1] >= 0
        return F.pad(tokens[:, 1:].masked_fill(~counted, IGNORE), (0, 1), value=IGNORE)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        tokens, documents = batch["tokens"], batch["documents"]
        features = self._features(tokens, documents)
        return token_loss(
            features, self._model().head_weight, self.targets(tokens, documents), z_loss=self.z_loss
        )

    def evaluate(self, batch: Mapping[str, Tensor], prefix: str) -> None:
        """Adds a batch to the metrics under `prefix` (one of PREFIXES) at every context length; rows of
        weight 0 count nowhere.
        """
        row = batch["tokens"].shape[1]
        for length in (self.context, *self.eval_lengths):
            tokens, documents = (batch[name].reshape(-1, length) for name in ("tokens", "documents"))
            real = (batch["weight"] > 0).repeat_interleave(row // length)
            targets = self.targets(tokens, documents).masked_fill(~real[:, None], IGNORE)
            tag = self._tag(prefix, length)
            metrics = cast("dict[str, MeanMetric]", self.metrics[tag])
            self.measure(metrics, self._features(tokens, documents), targets)
            for name, metric in metrics.items():
                if name != "bits_per_byte" or self.token_bytes is not None:
                    self.log(
                        f"{tag}/{name}",
                        metric,
                        prog_bar=tag == "val" and name == "loss",
                        batch_size=len(tokens),
                    )

    def measure(self, metrics: Mapping[str, MeanMetric], features: Tensor, targets: Tensor) -> None:
        """Adds the counted targets of a batch to the metrics of one context length."""
        counted = targets != IGNORE
        count = counted.sum()
        nats = token_loss(features, self._model().head_weight, targets, total=True)
        metrics["loss"].update(nats / count.clamp_min(1), weight=count)
        metrics["perplexity"].update(nats / count.clamp_min(1), weight=count)
        if self.token_bytes is not None:
            length = self.token_bytes.to(targets.device)[targets[counted]].sum()
            metrics["bits_per_byte"].update(nats / (math.log(2) * length.clamp_min(1)), weight=length)

    def example_batch(self, samples: int) -> dict[str, Tensor]:
        """Rows of four documents of unlike lengths where they are kept apart, else of one."""
        tokens = torch.zeros(samples, self.context, dtype=torch.int64)
        ends = torch.tensor([self.context * share // 100 for share in (7, 31, 58)])
        documents = torch.bucketize(torch.arange(self.context), ends, right=True).expand_as(tokens)
        return {
            "tokens": tokens,
            "documents": documents if self.isolate_documents else torch.zeros_like(tokens),
            **keys(samples),
        }

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuses data that this model cannot take, before training.

        Raises:
            UserError: no tokens, a larger vocabulary, rows of another length, validation rows that the
                context lengths do not divide.
        """
        if facts["kind"] != "tokens":
            raise UserError(f"a language model needs tokens, and the data holds {facts['kind']}")
        vocabulary, length = facts.get("vocabulary"), facts["length"]
        if vocabulary is not None and vocabulary > self.vocab_size:
            raise UserError(
                f"the data has {vocabulary} token ids and model.backbone_options.vocab_size is "
                f"{self.vocab_size}; set it to {vocabulary} or more"
            )
        if length != self.context:
            raise UserError(
                f"the data's rows hold {length} tokens and model.backbone_options.context is "
                f"{self.context}; they must be equal"
            )
        val_length = facts.get("val_length") or length
        for window in (self.context, *self.eval_lengths):
            if val_length % window:
                raise UserError(
                    f"validation rows of {val_length} tokens do not divide into windows of {window};"
                    " data.val_length must be a multiple of context and of every length in model.eval_lengths"
                )
        found = facts.get("token_bytes")
        self.token_bytes = None if found is None else torch.as_tensor(found)

    def _model(self) -> LanguageBackbone:
        return cast(LanguageBackbone, self.backbone)

    def _features(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Hands on only what changes a number: no token sees padding on its right, and one document a row
        needs no isolation.
        """
        padded = documents < 0
        borders = (documents[:, 1:] != documents[:, :-1]) & ~padded[:, 1:] & ~padded[:, :-1]
        several, left = torch.stack([borders.any(), padded[:, 0].any()]).tolist()
        isolate = self.isolate_documents and several
        mask = ~padded if left or isolate else None
        return self._model().features(tokens, mask, documents if isolate else None)

    def _tag(self, prefix: str, length: int) -> str:
        """`val` of the trained length, `val_1024` of another."""
        return f"{prefix}_{length}" if length in self.eval_lengths else prefix


class RecallTask(LanguageTask):
    """Multi-query associative recall (arXiv 2312.04927): what counts is the token after a key that the row
    has shown before.

    Keys are the lower half of the vocabulary. Validation logs `accuracy` beside the loss. Arguments as
    :class:`LanguageTask`.
    """

    METRICS = LanguageTask.METRICS | {"accuracy": MeanMetric}

    def targets(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Of the next tokens those that answer a repeated key."""
        query = (tokens < self.vocab_size // 2) & seen_before(tokens)
        return super().targets(tokens, documents).masked_fill(~query, IGNORE)

    def measure(self, metrics: Mapping[str, MeanMetric], features: Tensor, targets: Tensor) -> None:
        super().measure(metrics, features, targets)
        counted = targets != IGNORE
        guesses = F.linear(features[counted], self._model().head_weight).argmax(-1)
        hits = (guesses == targets[counted]).float()
        metrics["accuracy"].update(hits.sum() / max(1, len(hits)), weight=len(hits))

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """As :class:`LanguageTask`, and that both agree on which half of the vocabulary are keys. Raises
        UserError.
        """
        super().check_data(facts, micro_batch)
        vocabulary = facts.get("vocabulary")
        if vocabulary not in (None, self.vocab_size):
            raise UserError(
                f"the data has {vocabulary} token ids and model.backbone_options.vocab_size is "
                f"{self.vocab_size}; recall needs them equal"
            )


def seen_before(tokens: Tensor) -> Tensor:
    """(batch, tokens) bool: whether the same token stands earlier in the row."""
    values, order = tokens.sort(dim=1, stable=True)
    repeated = F.pad(values[:, 1:] == values[:, :-1], (1, 0), value=False)
    return torch.zeros_like(repeated).scatter_(1, order, repeated)
