"""Train a classifier, save, resume, load and classify.

mhla data pack mnist --to data/mnist && python examples/classify_images.py data/mnist
"""

import sys

import lightning.pytorch as pl

from mhla_lightning import EMA, ClassificationTask, ImageDataModule, ScheduleConfig, Task

data = ImageDataModule(sys.argv[1], batch_size=16, image_size=32)
size = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
task = ClassificationTask("deit_tiny", "mhla", size, data.num_classes, schedule=ScheduleConfig("constant"))
trainer = pl.Trainer(max_epochs=1, callbacks=[EMA(0.9)])
trainer.fit(task, data)
longer = pl.Trainer(max_epochs=2, callbacks=[EMA(0.9)])
longer.fit(task, data, ckpt_path=trainer.checkpoint_callback.best_model_path)
task = Task.load_from_checkpoint(longer.checkpoint_callback.best_model_path)
predictions = trainer.predict(task, data)  # logits and probabilities of every image
