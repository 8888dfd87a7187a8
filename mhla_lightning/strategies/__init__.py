"""How a run is spread over devices: DeepSpeed's ZeRO presets, Lightning's own strategies by their names,
and what of the weights a rank holds.
"""
