"""Ahead-of-time compilation of Triton kernels for GPUs that are not here.

Triton brings its own assembler and disassembler. It keeps compiled kernels in its cache on disk, so only
changed ones are compiled again.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhla_lightning.attention.mhla.triton.launch import Launch

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may take, by compute capability."""

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class KernelCode:
    """What the assembler says about one kernel.

    Attributes:
        name: of the kernel.
        capability: compute capability, 80 or 90.
        warps, stages: as asked for.
        registers: a thread.
        shared: bytes a program.
        spilled: bytes of a thread's stack and local memory, with instructions that read or write them.
        tensor_core: instructions on tensor cores, of which `warp_group` are Hopper's.
    """

    name: str
    capability: int
    warps: int
    stages: int
    registers: int
    shared: int
    spilled: int
    tensor_core: int
    warp_group: int


def compile_launch(launch: Launch, capability: int) -> KernelCode:
    """Compile the kernel of a launch as a GPU would specialize it.

    Args:
        launch: of :func:`mhla_lightning.attention.mhla.triton.launch.recorded`.
        capability: 80 or 90.
    """
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return KernelCode(
        launch.name,
        capability,
        launch.warps,
        launch.stages,
        registers,
        compiled.metadata.shared,
        stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        len(re.findall(r"\b(?:HMMA|HGMMA)\b", code)),
        len(re.findall(r"\bHGMMA\b", code)),
    )


def _source(launch: Launch) -> ASTSource:
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for number, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        constant = parameter.is_constexpr or (isinstance(value, int) and value == 1)
        if constant:
            signature[parameter.name], constants[(number,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
