"""What models cost and how runs differ: tables and figures from numbers. `variants` and `comparison` need
no torch.
"""
