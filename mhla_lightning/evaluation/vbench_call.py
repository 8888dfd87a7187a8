"""Runs in the interpreter that has VBench, which may be another than ours: standard library, torch and
vbench alone, Python 3.8.
"""

import json
import sys

sys.path.pop(0)  # this file's folder, where vbench.py is not the package


def main():  # type: ignore[no-untyped-def]  # noqa: ANN201  Python 3.8 reads this
    """argv[1]: JSON of videos, output, name, dimensions, mode and device; VBench writes
    OUTPUT/NAME_eval_results.json.
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
    main()
