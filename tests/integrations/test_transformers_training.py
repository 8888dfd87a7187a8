"""Training by transformers' Trainer and PEFT: mixing matrices stay in their range and are not decayed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is the extra 'language'")
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from mhla_lightning.hf import LORA_TARGETS, MHLAForCausalLM, ProjectMixingCallback, parameter_groups, wrap
from tests.helpers.errors import refused
from tests.helpers.language_models import tiny_model

ENTRY = {"name": "mhla", "chunk_size": 8}


def model(entry: object = ENTRY) -> MHLAForCausalLM:
    return wrap(tiny_model(entry, torch.float32), "mhla", 0).train()


def handler(trained: MHLAForCausalLM) -> CallbackHandler:
    return CallbackHandler([ProjectMixingCallback()], trained, None, None, None)


def arguments(**given: object) -> argparse.Namespace:
    """What the callback reads of TrainingArguments, which need the package accelerate."""
    return argparse.Namespace(**{"deepspeed": None, "fsdp": [], **given})


def mixing(trained: MHLAForCausalLM) -> torch.Tensor:
    return torch.cat([p.flatten() for name, p in trained.named_parameters() if "mixing" in name])


@pytest.mark.parametrize("projected", [True, False])
def test_mixing_stays_in_its_range_only_with_the_callback(projected: bool) -> None:
    trained = model()
    optimizer = torch.optim.AdamW(parameter_groups(trained, 0.1), lr=0.1)
    callbacks, state, control = handler(trained), TrainerState(), TrainerControl()
    callbacks.on_train_begin(arguments(), state, control)
    ids = torch.randint(1, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if projected:
            callbacks.on_step_end(arguments(), state, control)
    weights = mixing(trained)
    assert bool(((weights >= 0) & (weights <= 1)).all()) == projected


def test_the_trainer_itself_calls_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    trained = model()
    rows = torch.randint(1, 60, (16, 32), generator=torch.Generator().manual_seed(0))
    given = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    optimizer = torch.optim.AdamW(parameter_groups(trained, 0.1), lr=0.1)
    data = [{"input_ids": row, "labels": row} for row in rows]
    callbacks = [ProjectMixingCallback()]
    Trainer(trained, given, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None)).train()
    weights = mixing(trained)
    assert weights.min() >= 0
    assert weights.max() <= 1


@pytest.mark.parametrize("key", ["deepspeed", "fsdp"])
def test_split_weights_and_models_without_a_matrix_are_refused(key: str) -> None:
    begin = [TrainerState(), TrainerControl()]
    with refused(key):
        handler(model()).on_train_begin(arguments(**{key: "config"}), *begin)
    with refused("model"):
        handler(model("softmax")).on_train_begin(arguments(), *begin)


def test_groups_leave_mixing_norms_and_biases_without_decay() -> None:
    trained = model()
    names = {id(p): name for name, p in trained.named_parameters()}
    decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(trained, 0.1)}
    assert decay[0.1] | decay[0.0] == set(names.values())
    assert {name for name in names.values() if "mixing" in name or "norm" in name} <= decay[0.0]
    assert all(trained.get_parameter(name).dim() > 1 and "mixing" not in name for name in decay[0.1])


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft 0.21 asks
def test_lora_adapts_projections_by_default() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model(), LoraConfig(r=2))
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == set(LORA_TARGETS)
    ids = torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in adapted.parameters())
