"""Benchmarks: one net as graphnet's step beside what torch makes of it, in one interleaved run.

twin.py    the same net in torch.nn
peers.py   torch's ways to run it: the variants of eager and of torch.compile
rounds.py  interleaved timing, medians and quartiles
parity.py  both learn the same: losses side by side, before anything is timed
bench.py   the command: settings, results as a table and as JSON
"""
