"""Other libraries at work, a file per family: how they are set up with the same weights, and the loops users write.

Nothing is timed here. A peer that takes an environment of its own is a process: `process.py` talks to it. Peers that
need CUDA belong here as well, in a file of their own that only `bench/device.py` and workloads for "cuda" import.
"""
