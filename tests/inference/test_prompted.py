"""Jobs of prompts: their settings name the folders of stopped jobs, which later versions continue."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.inference.diffusion.prompts import Prompt
from mhla_lightning.inference.diffusion.text_images import TextDrawing, TextImageJob
from mhla_lightning.inference.diffusion.video_job import VideoJob
from mhla_lightning.inference.diffusion.videos import Size, VideoDrawing

WORDS = TextEncoding("words:8", 6, 8)
PROMPTS = (Prompt("a", "line 1"), Prompt("b", "line 2"))
LAST = ["size", "seed", "sampler", "steps", "guidance", "text_encoder", "batch_size"]


def found(encoding: TextEncoding) -> Any:
    identity = {"format": 1, "run": "r"}
    return cast(Any, SimpleNamespace(data=SimpleNamespace(text_encoder=encoding), identity=lambda: identity))


def test_settings_are_those_of_earlier_versions() -> None:
    images = TextImageJob(found(WORDS), PROMPTS, 2, TextDrawing(), 3)
    assert list(images.settings()) == ["format", "run", *LAST, "each", "prompts"]
    videos = VideoJob(found(WORDS), PROMPTS, 2, VideoDrawing(Size(9, 16, 16)), 3, 8.0)
    assert list(videos.settings()) == ["format", "run", *LAST, "rate", "clips", "prompts"]
    for settings in (images.settings(), videos.settings()):
        words = {"name": "words:8", "tokens": 6, "channels": 8, "sha256": None, "empty": None}
        assert settings["text_encoder"] == words
        assert settings["prompts"] == ["a", "b"]
    assert videos.settings()["size"] == [9, 16, 16]
    assert images.texts == videos.texts == ("a", "a", "b", "b")


def test_an_instruction_makes_other_samples() -> None:
    told = TextEncoding("gemma", 6, 8, instruction="sana")
    settings = TextImageJob(found(told), PROMPTS, 1, TextDrawing(), 1).settings()
    assert settings["text_encoder"]["instruction"] == "sana"
