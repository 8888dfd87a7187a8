"""Triton kernels of MHLA; only `choice` is imported on machines without Triton.

`choice.py` says which implementation runs, and `tiles.py` which tiles a kernel takes. `launch.py` starts or
records kernels. `device.py` holds what all kernels share, `dense.py` and `blocks.py` one form of the operator
each, and `ops.py` makes them operators of torch.
"""
