"""AutoencoderKLWan: latents normalised channel by channel, one video at a time, and the sizes that it
takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_lightning.data.encoders.vaes import VideoAutoencoder, decode_videos, load_video_vae
from mhla_lightning.errors import UserError
from tests.helpers.vaes import save_kl, save_wan

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan, a model."""
    root = tmp_path_factory.mktemp("wan")
    save_wan(root / "wan")
    return root


@torch.no_grad()
def test_the_vae_is_that_of_diffusers(root: Path) -> None:
    from diffusers import AutoencoderKLWan

    model: Any = AutoencoderKLWan.from_pretrained(root / "wan", low_cpu_mem_usage=False)
    vae = load_video_vae(str(root / "wan"))
    videos = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = vae.encode(videos)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    posterior = torch.cat([model.encode(video).latent_dist.mode() for video in videos.split(1)])
    torch.testing.assert_close(found, (posterior - mean) / std, atol=1e-5, rtol=1e-5)
    assert found.shape == (2, *vae.latent_shape(9, 16, 24))
    decoded = vae.decode(found)
    torch.testing.assert_close(
        decoded, torch.cat([model.decode(z).sample for z in posterior.split(1)]), atol=1e-5, rtol=1e-5
    )
    assert decoded.shape == videos.shape
    frames = decode_videos(vae, found)
    assert (frames.shape, frames.dtype) == ((2, 9, 16, 24, 3), torch.uint8)
    assert (frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1 - decoded).abs().max() < 0.01
    assert torch.equal(vae.encode(videos[1:]), found[1:]), "each video by itself"


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((8, 16, 24), "9 frames of 16x24"),
        ((9, 15, 24), "9 frames of 16x24"),
        ((2, 16, 1), "1 frames of 16x4"),
        ((0, 16, 16), "1 frames of 16x16"),
    ],
    ids=str,
)
def test_the_message_names_the_nearest_size(root: Path, size: tuple[int, int, int], nearest: str) -> None:
    vae = load_video_vae(str(root / "wan"))
    with pytest.raises(UserError, match=f"{nearest}$"):
        vae.latent_shape(*size)
    frames, height, width = (int(word) for word in nearest.replace(" frames of ", "x").split("x"))
    assert vae.encode(torch.zeros(1, 3, frames, height, width)).shape[1:] == vae.latent_shape(
        frames, height, width
    )


def test_the_sizes_of_wan() -> None:
    """SPEC 6.1, of the real configuration on the meta device: 81 x 480 x 800 -> 16 x 21 x 60 x 100."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model: Any = AutoencoderKLWan()
    vae = VideoAutoencoder("wan", model, "")
    assert vae.latent_shape(81, 480, 800) == (16, 21, 60, 100)
    config: Any = vae.model.config
    assert (config.latents_mean[0], config.latents_std[-1]) == (-0.7571, 1.9160)  # SPEC 6.6


def test_other_vaes_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="z_dim 8"):
        load_video_vae(save_wan(tmp_path / "wan", z_dim=8))
    with pytest.raises(UserError, match="'AutoencoderKL'.*AutoencoderKLWan"):
        load_video_vae(save_kl(tmp_path / "kl"))
    assert (
        load_video_vae(str(root / "wan"), dtype=torch.bfloat16).sha256
        == load_video_vae(str(root / "wan")).sha256
    )
