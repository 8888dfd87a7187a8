"""torch.compile of a backbone, in place, so that the names of its weights stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from mhla_lightning.errors import UserError

Parts = Literal["blocks", "whole"]
CompileModule = Callable[[nn.Module], None]


@runtime_checkable
class Compilable(Protocol):
    """A backbone that knows which of its modules to compile."""

    def compile_parts(self, what: Parts, compile_module: CompileModule) -> None: ...


@dataclass(frozen=True)
class Compilation:
    """How a backbone is compiled.

    Args:
        what: `blocks` compiles every block, and blocks of one kind share their code, so that the first step
            comes soon. `whole` compiles the backbone as one, and fuses across blocks.
        backend, mode, dynamic, options: as of torch.compile.

    Raises:
        UserError: `mode` beside `options`.
    """

    what: Parts = "blocks"
    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.options is not None:
            raise UserError("compile.mode", "torch.compile takes `mode` or `options`, not both")

    def check(self, model: object) -> None:
        """Refuse what torch.compile or the model cannot do.

        Args:
            model: the backbone, with or without weights.

        Raises:
            UserError: an unknown backend, mode or option, a missing C++ compiler, another library's backbone.
        """
        if not isinstance(model, Compilable):
            raise UserError(
                "what", f"{type(model).__name__} has no parts to compile (`compile_parts`); write null"
            )
        if self.backend not in torch.compiler.list_backends(exclude_tags=()):
            usual = ", ".join([*torch.compiler.list_backends(), "aot_eager", "eager"])
            raise UserError("backend", f"torch has no backend '{self.backend}'; choose from {usual}")
        compiler = os.environ.get("CXX") or "g++"
        if self.backend == "inductor" and not torch.cuda.is_available() and shutil.which(compiler) is None:
            raise UserError(
                "backend",
                f"on a CPU inductor needs a C++ compiler, and '{compiler}' is not here; install one or name "
                "it in the environment variable CXX",
            )
        try:
            self._compile(nn.Identity())
        except RuntimeError as error:
            raise UserError("mode" if self.mode is not None else "options", str(error)) from error

    def apply(self, model: nn.Module, gathered: bool = False) -> list[nn.Module]:
        """Compile the model's parts at their first call, and return them.

        Args:
            model: the backbone.
            gathered: hooks of a part gather its weights before it runs and release them afterwards. They stay
                outside of the compiled code, and the part cannot be copied any more.
        """
        assert isinstance(model, Compilable)
        parts: list[nn.Module] = []

        def compile_part(part: nn.Module) -> None:
            if gathered:
                part.forward = torch.compile(part.forward, **self._arguments())
            else:
                self._compile(part)
            parts.append(part)

        model.compile_parts(self.what, compile_part)
        return parts

    def _compile(self, module: nn.Module) -> None:
        module.compile(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        options = None if self.options is None else dict(self.options)
        return {"backend": self.backend, "mode": self.mode, "dynamic": self.dynamic, "options": options}
