"""The run folder: names, lock, files that other verbs read. `folder` and `lock` need the standard library
alone.
"""
