"""torch.compile of whole backbones and of their blocks, and what the backward finds of the forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mhla_lightning.attention.packing import Packing
from mhla_lightning.backbones import build_backbone, register_backbone
from mhla_lightning.backbones.activations import Activations, Offload, offloading_as_on_gpu
from mhla_lightning.backbones.compiling import Compilation, Parts
from mhla_lightning.tasks import (
    ClassificationTask,
    ImageDiffusionTask,
    LanguageTask,
    Task,
    VideoDiffusionTask,
)
from mhla_lightning.tasks.distillation import Distillation
from mhla_lightning.tasks.image_diffusion import ImageDiffusionLossConfig
from tests.helpers.compiled import compiled_counts
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

MODES: tuple[Activations, ...] = ("none", "blocks", "attention", "offload")
BEST = {"name": "mhla", "preset": "best", "chunk_size": 16}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"  # dynamo looks at it
)


def classifier(**options: Any) -> Task:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2}
    return ClassificationTask("deit_tiny", "mhla", sizes, num_classes=7, **options)


def image_model(**options: Any) -> Task:
    sizes = {"input_size": 16, "embed_dim": 48, "num_heads": 2, "depth": 3, "num_classes": 7}
    return ImageDiffusionTask("dit_s2", "mhla", sizes, **options)


def video_model(**options: Any) -> Task:
    sizes = {"input_size": [4, 32, 32], "embed_dim": 48, "ffn_dim": 64, "depth": 3}
    return VideoDiffusionTask("wan_tiny", "mhla", sizes, **options)


def language_model(attention: Any = "mhla", **options: Any) -> Task:
    sizes = {"context": 128, "vocab_size": 64, "depth": 3, "embed_dim": 64, "intermediate": 48}
    return LanguageTask("lm_tiny", attention, sizes, **options)


FAMILIES: dict[str, Callable[..., Task]] = {
    "classification": classifier,
    "image_dit": image_model,
    "video_dit": video_model,
    "language": language_model,
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ready(task: Task) -> Task:
    """Build a task in training, with weights away from the start, where many are zero."""
    torch.manual_seed(0)
    task.configure_model()
    assert task.backbone is not None
    with torch.no_grad():
        for name, parameter in task.backbone.named_parameters():
            if not name.endswith("mixing.weight"):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return task.train()


def batch_for(task: Task, samples: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    example = task.example_batch(samples)
    return {name: torch.randn(x.shape) if x.is_meta else x for name, x in example.items()}


def step(task: Task, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss and the gradients of a step."""
    task.zero_grad()
    loss = cast(Tensor, task.training_step(batch, 0))
    loss.backward()
    return [loss.detach(), *(p.grad for p in task.parameters() if p.grad is not None)]


def check_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 10
    for mine, theirs in zip(found, wanted, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * scale + 1e-9)


@pytest.mark.parametrize("family", every_nth(FAMILIES, 2))
@pytest.mark.parametrize("what", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_compiled_task_trains_alike_with_few_graphs(family: str, what: Parts) -> None:
    plain = ready(FAMILIES[family]())
    compiled = ready(FAMILIES[family](compile=Compilation(what, backend="aot_eager")))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    batch = batch_for(plain)
    with compiled_counts() as counts:
        check_equal(step(compiled, batch), step(plain, batch))
        check_equal(step(compiled, batch), step(plain, batch))
    assert counts.graphs == 1  # blocks of one kind share theirs
    assert counts.breaks == {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("how", "what"),
    [
        *((how, None) for how in MODES[1:]),
        *(pytest.param(how, "blocks", marks=pytest.mark.slow) for how in MODES[1:]),
        pytest.param("blocks", "whole", marks=pytest.mark.slow),
        pytest.param("attention", "whole", marks=pytest.mark.slow),
    ],
)
def test_activations_that_are_kept_change_no_gradient(
    family: str, how: Activations, what: Parts | None
) -> None:
    compilation = None if what is None else Compilation(what, backend="aot_eager")
    plain = ready(FAMILIES[family]())
    other = ready(FAMILIES[family](checkpoint_activations=how, compile=compilation))
    batch = batch_for(plain)
    check_equal(step(other, batch), step(plain, batch))


@pytest.mark.parametrize(("how", "runs"), [("none", 1), ("attention", 2), ("blocks", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_runs_again_what_it_is_to(family: str, how: Activations, runs: int) -> None:
    task = ready(FAMILIES[family](checkpoint_activations=how))
    assert task.backbone is not None
    calls = {"operator": 0, "mlp": 0}
    for name, module in task.backbone.named_modules():
        kind = {"attention": "operator", "mlp": "mlp", "ffn": "mlp"}.get(name.rpartition(".")[2])
        if kind is not None and name.startswith(("blocks.", "layers.")):
            # Before the call: the second run of a checkpoint ends inside its last layer.
            module.register_forward_pre_hook(lambda *_, kind=kind: calls.__setitem__(kind, calls[kind] + 1))
    step(task, batch_for(task))
    assert calls == {"operator": 3 * runs, "mlp": 3 * (2 if how == "blocks" else 1)}


@pytest.mark.slow
def test_one_graph_for_each_grid() -> None:
    model = build_backbone("wan_tiny", input_size=[4, 32, 32], embed_dim=48, ffn_dim=64, depth=2)
    Compilation("blocks", backend="aot_eager", dynamic=False).apply(model)
    text = torch.randn(1, 3, 64)
    with compiled_counts() as counts:
        for size in ((4, 32, 32), (8, 32, 32), (4, 32, 64)):
            for _ in range(2):
                model(torch.randn(1, 3, *size), torch.tensor([300.0]), text)
    assert counts.graphs == 3
    assert counts.breaks == {}


def documents(rng: random.Random, tokens: int) -> Tensor:
    """A row of documents of random lengths."""
    row: list[int] = []
    while len(row) < tokens:
        row += [len(set(row))] * rng.randint(1, 60)
    return torch.tensor(row[:tokens])


@pytest.mark.parametrize(
    ("attention", "what", "layouts"),
    [
        ("mhla", "blocks", 15),
        pytest.param("mhla", "blocks", 50, marks=pytest.mark.slow),
        pytest.param("mhla", "whole", 50, marks=pytest.mark.slow),
        pytest.param(BEST, "blocks", 50, marks=pytest.mark.slow),
        pytest.param("linear", "blocks", 50, marks=pytest.mark.slow),
        pytest.param("softmax", "blocks", 50, marks=pytest.mark.slow),
        pytest.param(["softmax", "mhla"], "whole", 50, marks=pytest.mark.slow),
        pytest.param(
            {"name": "mhla", "intra": "window", "chunk_size": 16}, "blocks", 50, marks=pytest.mark.slow
        ),
        pytest.param(
            {"name": "mhla", "chunk_size": 16, "max_chunks": 2, "extrapolation": "shift", "decay": "head"},
            "blocks",
            50,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_layouts_of_documents_share_a_graph(attention: Any, what: Parts, layouts: int) -> None:
    plain = ready(language_model(attention))
    compiled = ready(language_model(attention, compile=Compilation(what, backend="aot_eager")))
    rng = random.Random(0)
    graphs = []
    with compiled_counts() as counts:
        for _ in range(layouts):
            rows = torch.stack([documents(rng, 128) for _ in range(2)])
            batch = {"tokens": torch.randint(0, 64, (2, 128)), "documents": rows, "weight": torch.ones(2)}
            check_equal(step(compiled, batch), step(plain, batch))
            graphs.append(counts.graphs)
    assert counts.breaks == {}
    kinds = len(attention) if isinstance(attention, list) and what == "blocks" else 1
    assert graphs[-1] == graphs[9] <= 3 * kinds


def test_chunks_come_in_few_numbers() -> None:
    rng = random.Random(1)
    rows = [documents(rng, 128)[None] for _ in range(50)]
    exact = {Packing(None, row).chunks(16).count for row in rows}
    few = {Packing(None, row, few_layouts=True).chunks(16).count for row in rows}
    assert len(exact) > 4 >= len(few)
    assert all(count % 2 == 0 for count in few)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("compile.backend", {"compile": Compilation(backend="fast")}),
        ("compile.mode", {"compile": Compilation(mode="fastest")}),
        ("compile.options", {"compile": Compilation(options={"no_such": 1})}),
        ("compile", {"compile": "whole", "checkpoint_activations": "offload"}),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_before_weights_are_built(
    key: str, options: dict[str, Any]
) -> None:
    with refused(key):
        classifier(**options)


def test_mode_and_options_exclude_each_other() -> None:
    with refused("compile.mode"):
        Compilation(mode="default", options={"max_autotune": True})


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refused("compile.backend") as error:
        classifier(compile="blocks")
    assert "no-such-compiler" in error.value.reason


def test_distillation_and_compilation_exclude_each_other() -> None:
    loss = ImageDiffusionLossConfig(distill=Distillation(teacher="teacher.safetensors"))
    with refused("compile"):
        image_model(loss=loss, compile="blocks")


class Plain(nn.Module):
    """A user's backbone, which neither recomputes nor compiles."""

    grid = (4,)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(4, num_classes)

    def flops(self, shape: Any) -> int:
        return 1


@pytest.mark.parametrize(
    ("name", "key"),
    [("compile", "compile.what"), ("checkpoint_activations", "checkpoint_activations")],
)
def test_a_backbone_without_parts_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    monkeypatch.setattr("mhla_lightning.backbones.BACKBONES", {})
    register_backbone("plain", lambda attention, num_classes=1: Plain(num_classes))
    with refused(key):
        ClassificationTask("plain", num_classes=7, **cast(Any, {name: "blocks"}))


def test_weights_and_small_tensors_stay_where_they_are() -> None:
    layer = nn.Linear(256, 512)
    hooks = Offload(layer)
    with offloading_as_on_gpu():
        assert hooks.moves(torch.empty(64, 300, 256))
        assert not hooks.moves(torch.empty(64, 4))
        assert not hooks.moves(torch.empty(512, 256, dtype=torch.bfloat16))  # a copy under autocast
        assert not hooks.moves(torch.empty(256, 512))
    assert not hooks.moves(torch.empty(64, 300, 256))  # on a CPU nothing moves


def test_hooks_that_gather_weights_stay_outside_of_compiled_blocks() -> None:
    """As under ZeRO-3: the weights of a block are there only while it runs."""
    torch.manual_seed(0)
    model = build_backbone("deit_tiny", attention="mhla", img_size=16, patch_size=8, embed_dim=48, depth=3)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(images)
        parts = Compilation("blocks", backend="aot_eager").apply(model, gathered=True)
        assert parts == list(cast(Any, model).blocks)
        gathered: list[int] = []
        for number, part in enumerate(parts):
            kept = {weight: weight.data for weight in part.parameters()}

            def gather(*_: Any, number: int = number, kept: dict[nn.Parameter, Tensor] = kept) -> None:
                gathered.append(number)
                for weight, data in kept.items():
                    weight.data = data

            def release(*_: Any, kept: dict[nn.Parameter, Tensor] = kept) -> None:
                for weight in kept:
                    weight.data = torch.empty(0)

            release()
            part.register_forward_pre_hook(gather)
            part.register_forward_hook(release)
        with compiled_counts() as counts:
            outputs = [model(images) for _ in range(3)]
    assert gathered == [0, 1, 2] * 3
    assert counts.graphs == 1
    assert counts.breaks == {}
    assert all(torch.allclose(output, expected, atol=1e-6) for output in outputs)
