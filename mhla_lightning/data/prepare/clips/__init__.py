"""Videos to shards of clips."""
