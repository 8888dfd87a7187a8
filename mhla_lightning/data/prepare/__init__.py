"""Making shards, and looking at them: what `mhla data` calls."""
