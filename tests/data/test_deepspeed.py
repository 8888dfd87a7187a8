"""The loader under DeepSpeed: Lightning 2.6.6 stumbles there over plain DataLoaders of ready batches (its
issue 19460).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mhla_lightning.data import ImageDataModule

# Three overrides let Lightning's strategy run on a CPU; it must be chosen before deepspeed is imported, so
# this is a process of its own.
TRAIN = """
import json, os, sys
os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
import lightning.pytorch as pl, torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from mhla_lightning.data import Augmentation, ImageDataModule, ReadingConfig

class OnCPU(DeepSpeedStrategy):
    root_device = property(lambda self: torch.device("cpu", 0))
    def setup_environment(self): super(DeepSpeedStrategy, self).setup_environment()
    def setup_distributed(self): reset_seed(); self.set_world_ranks(); self._init_deepspeed_distributed()

class Probe(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.indices = torch.nn.Linear(192, 4), []
    def training_step(self, batch, number):
        self.indices += batch["index"].tolist()
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])
    def validation_step(self, batch, number):
        assert batch["image"].shape[0] == 4
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

plain = Augmentation(auto_augment=None, re_prob=0.0)
reading = ReadingConfig(num_workers=2)
data = ImageDataModule(
    sys.argv[1], batch_size=8, micro_batch_size=4, image_size=8, augmentation=plain, reading=reading
)
strategy = OnCPU(stage=2, process_group_backend="gloo")
names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
quiet = {name: False for name in names}
trainer = pl.Trainer(
    accelerator="cpu", devices=1, strategy=strategy, max_steps=10, accumulate_grad_batches=2, **quiet
)
model = Probe()
trainer.fit(model, data)
print(json.dumps({"steps": trainer.global_step, "indices": model.indices}))
"""


@pytest.mark.slow
def test_batches_of_the_loader_train_under_deepspeed(shards: Path, tmp_path: Path) -> None:
    """ZeRO-2, accumulation 2, 2 workers, validation: every sample in its place. The first run on a machine
    compiles for a minute.
    """
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, "-c", TRAIN, str(shards), "29571"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    places = ImageDataModule(str(shards), batch_size=8).corpus.locate(np.arange(80))
    assert found == {"steps": 10, "indices": [place.index for place in places]}
