"""MHLA of short rows on a CPU as one compiled operation.

`dense.cpp` is the code, and `building` compiles it.
"""
