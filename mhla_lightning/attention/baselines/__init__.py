"""Operators beside MHLA: softmax, linear attention, and gated operators of other papers."""
