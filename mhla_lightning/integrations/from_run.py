"""Open trained runs as models of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mhla_lightning.integrations.transformers import MHLAForCausalLM, wrap

if TYPE_CHECKING:
    from mhla_lightning.inference.loading import LanguageRun


def to_hf(run: LanguageRun | str | Path) -> MHLAForCausalLM:
    """Return the language model of a run as a model of transformers.

    Args:
        run: id, folder, or the result of `inference.loading.find_language_run`; averaged weights are taken
            where the run has them.

    Raises:
        UserError: no such run, no language run, no checkpoint, or no tokenizer.
    """
    # Imported here, because only a run needs Lightning; the model of `mhla_lightning.hf` does not.
    from mhla_lightning.inference.loading import find_language_run, load_model

    found = find_language_run(str(run)) if isinstance(run, (str, Path)) else run
    return wrap(load_model(found), found.attention, found.tokenizer.end)
