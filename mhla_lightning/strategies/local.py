"""The part of a model's weights that this process holds, under every strategy.

EMA, projection and checkpoints read and write weights through it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """A stretch of a weight or buffer that this rank holds.

    Attributes:
        name: of the tensor in the module.
        shape: of the whole tensor.
        start: first element of the stretch, in the flattened tensor.
        size: its elements.
        values: flat view of the numbers that count: the float32 master where the strategy keeps one, else the
            weight itself. Empty while they are on a disk (LocalWeights.loaded).
        owned: whether this rank saves it (rank 0 saves the tensors that every rank holds whole).
        flat: the optimizer's own tensor that `values` is a part of; None where no optimizer steps it.
        offset: first element of `values` in `flat`.
        parameter: of the module, where ranks hold it in parts.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    values: Tensor
    owned: bool = True
    flat: Tensor | None = None
    offset: int = 0
    parameter: nn.Parameter | None = None


Change = tuple[nn.Parameter, Callable[[Tensor], object]]
"""A parameter, and a function that changes a stretch of it in place, each element by itself."""


class LocalWeights(ABC):
    """The floating-point tensors of a module as this rank holds them.

    Attributes:
        sharded: whether a rank holds parts of weights or of the optimizer's state.
    """

    sharded = True

    @abstractmethod
    def fragments(self, module: nn.Module) -> list[Fragment]:
        """Return every floating weight and buffer of the module, or this rank's stretch of it."""

    def lots(self, fragments: Sequence[Fragment]) -> list[list[Fragment]]:
        """Group fragments by what is in memory at one time; one lot where nothing is on a disk."""
        return [list(fragments)]

    def loaded(self, lot: list[Fragment], changed: bool = False) -> AbstractContextManager[list[Fragment]]:
        """Return a context in which a lot's values and their optimizer state are in memory.

        Args:
            lot: one of :meth:`lots`.
            changed: keep the numbers that are written into them.
        """
        return nullcontext(lot)

    def change(self, changes: Sequence[Change]) -> None:
        """Change parameters in place, in every tensor of this process that holds values of them.

        Every rank calls it.
        """
        for parameter, function in changes:
            for values in self._copies(parameter):
                function(values)

    @abstractmethod
    def _copies(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return all tensors of this process that hold values of a parameter."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context in which parameters can be read whole. Every rank enters it."""
        return nullcontext()

    @abstractmethod
    def publish(self, module: nn.Module) -> None:
        """Make the next forward of every rank use the numbers written into `values`."""

    @abstractmethod
    def swapped(self, module: nn.Module, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context in which forwards of the module use other values.

        After it the module has its own values again, bit for bit.

        Args:
            module: the whole module or a part of it.
            values: flat stretches by fragment name.
        """


class WholeWeights(LocalWeights):
    """One device, or DDP: every rank holds everything."""

    sharded = False

    def fragments(self, module: nn.Module) -> list[Fragment]:
        return [whole_fragment(name, tensor) for name, tensor in floating_state(module).items()]

    def _copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.data]

    def publish(self, module: nn.Module) -> None:
        """Do nothing: weights and values are the same tensors."""

    @contextmanager
    def swapped(self, module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
        tensors = floating_state(module)
        own = {name: tensor.data for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                tensor.data = values[name].view(tensor.shape).to(tensor.dtype)
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = own[name]


def floating_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating tensors of a module's state by name, without copying them."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
    }


def whole_fragment(name: str, tensor: Tensor, owned: bool = True) -> Fragment:
    """Return the fragment of a tensor that this rank holds whole."""
    return Fragment(name, tuple(tensor.shape), 0, tensor.numel(), tensor.detach().reshape(-1), owned)
