"""Train a diffusion model, save, resume, load and draw an image of every class label.

mhla data pack mnist --to data/mnist && python examples/draw_images.py data/mnist
"""

import sys

import lightning.pytorch as pl

from mhla_lightning import EMA, ImageDataModule, ImageDiffusionTask, ScheduleConfig, Task

data = ImageDataModule(sys.argv[1], batch_size=16, image_size=16)
size = {"input_size": 16, "in_channels": 3, "embed_dim": 48, "depth": 2, "num_classes": data.num_classes}
task = ImageDiffusionTask("dit_s2", "mhla", size, "flow", schedule=ScheduleConfig("constant"))
trainer = pl.Trainer(max_epochs=1, callbacks=[EMA(0.9)])
trainer.fit(task, data)
longer = pl.Trainer(max_epochs=2, callbacks=[EMA(0.9)])
longer.fit(task, data, ckpt_path=trainer.checkpoint_callback.best_model_path)
task = Task.load_from_checkpoint(longer.checkpoint_callback.best_model_path)
predictions = trainer.predict(task, data)  # an image for the label of every sample
