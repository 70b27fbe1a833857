"""The phases of ``bench/device.py``: each runs in a process of its own and tells what it found line by line."""
