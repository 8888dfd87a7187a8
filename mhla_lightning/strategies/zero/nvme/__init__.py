"""ZeRO-3 with its state on a local disk. EXPERIMENTAL: options and behaviour may change.

The reads of DeepSpeed 0.19 have faults that patches.AlignedReads and `max_in_cpu: 0` work around.
"""
