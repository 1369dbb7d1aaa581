"""Our service of a table beside others, with one model, on one machine, in one run.

`python -m benchmarks.serving --help` says how.
"""
