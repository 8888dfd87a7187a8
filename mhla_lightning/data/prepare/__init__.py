"""Making, checking and showing shards: the library behind `mhla data`."""
