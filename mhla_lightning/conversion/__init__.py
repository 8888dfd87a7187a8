"""Other libraries' weights to ours, and ours to theirs."""
