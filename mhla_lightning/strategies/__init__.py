"""How a run is spread over devices.

DeepSpeed's ZeRO presets, Lightning's own strategies by their names, and the part of the weights that a rank
holds.
"""
