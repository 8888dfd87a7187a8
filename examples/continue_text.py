"""Train a language model, save, resume, load and continue texts.

mhla data tokenize stdlib --to data/code --length 128 && python examples/continue_text.py data/code
"""

import sys

import lightning.pytorch as pl

from mhla_lightning import EMA, LanguageTask, ScheduleConfig, Task, TokenDataModule

data = TokenDataModule(sys.argv[1], batch_size=8)
size = {"context": data.facts()["length"], "embed_dim": 64, "depth": 2}
task = LanguageTask("lm_tiny", "mhla", size, schedule=ScheduleConfig("constant"))
trainer = pl.Trainer(max_epochs=1, callbacks=[EMA(0.9)])
trainer.fit(task, data)
longer = pl.Trainer(max_epochs=2, callbacks=[EMA(0.9)])
longer.fit(task, data, ckpt_path=trainer.checkpoint_callback.best_model_path)
task = Task.load_from_checkpoint(longer.checkpoint_callback.best_model_path)
predictions = trainer.predict(task, data)  # the likeliest continuation of every row
