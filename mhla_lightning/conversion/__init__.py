"""Convert weights of other libraries to ours, and ours to theirs."""
