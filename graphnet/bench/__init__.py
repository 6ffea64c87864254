"""Benchmarks: one net as graphnet's step beside what torch makes of it, in interleaved rounds.

twin.py    the same net in torch.nn
peers.py   torch's ways to run it: which variants there are, and which make sense where
ours.py    our ways to run it, and our step without a part
parity.py  both compute the same: checked before anything is timed
rounds.py  interleaved timing, medians and quartiles
counts.py  launches and memory of a step
layers.py  where the time goes: by layer, by launch
facts.py   machine, versions, clocks, ceilings, names of files
result.py  what was found, as JSON and as text
bench.py   the command
"""
