"""Call VBench in the interpreter that has it, which may not be ours.

Uses the standard library, torch and vbench alone, and runs on Python 3.8.
"""

import json
import sys


def main():  # type: ignore[no-untyped-def]  # noqa: ANN201  Python 3.8 reads this
    """Measure videos; VBench writes OUTPUT/NAME_eval_results.json.

    argv[1]: JSON with videos, output, name, dimensions, mode and device.
    """
    import torch
    import vbench

    given = json.loads(sys.argv[1])
    full_info = vbench.__file__.replace("__init__.py", "VBench_full_info.json")
    evaluator = vbench.VBench(torch.device(given["device"]), full_info, given["output"])
    evaluator.evaluate(
        videos_path=given["videos"],
        name=given["name"],
        dimension_list=given["dimensions"],
        mode=given["mode"],
    )


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which holds another vbench.py
    main()
