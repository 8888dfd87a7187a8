"""A process in which Triton kernels run on the CPU, in Triton's interpreter.

Triton decides at the import of a kernel whether it is compiled or interpreted, so a process can do one of the
two. Nothing is imported here that imports Triton.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    patched = interpreter.InterpretedFunction.__call__

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        """Call a function inside a kernel; Triton 3.8 patches its language anew for each such call."""
        ours = self.fn.__module__.startswith("mhla_lightning")
        return self.rewrite()(*args, **kwargs) if ours else patched(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ProcessPoolExecutor]:
    """One process that runs functions of `tests.helpers.kernel_cases` in the interpreter."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_interpret) as pool:
        yield pool
