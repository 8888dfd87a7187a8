"""The run folder: its names, its lock and the files that other verbs read.

All but `logger` needs the standard library alone.
"""
