"""Write the bytecode of everything that the package imports, once, at installation.

    python .ci/compile.py [MODULE ...]

Where Python may not write bytecode at run time (PYTHONDONTWRITEBYTECODE, a read-only environment), every
process would compile its imports anew: `import lightning.pytorch` then takes 30 s instead of 11 s.
Importing compiles only what is imported: 58 s of a core, where `compileall` of site-packages takes 130 s.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings

LATER = (  # imported at first use
    "torch.optim.adamw",
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",
    "torch.export._trace",
    "sympy.tensor.tensor",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.original_muon",  # every ZeRO engine imports it, and with it torch._inductor
)


def main() -> None:
    """Import all modules of the package, and those that are named; a missing extra is left out."""
    sys.dont_write_bytecode = False
    warnings.simplefilter("ignore")
    import mhla_lightning
    from mhla_lightning.errors import UserError

    ours = (m.name for m in pkgutil.walk_packages(mhla_lightning.__path__, "mhla_lightning."))
    for name in (*ours, *LATER, *sys.argv[1:]):
        if not name.endswith("__main__"):
            try:
                importlib.import_module(name)
            except (ImportError, UserError) as error:  # ours names the extra that is missing
                sys.stderr.write(f"  without {name}: {error}\n")


if __name__ == "__main__":
    main()
