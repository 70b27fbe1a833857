"""ESMFold, read from `model`: the stem's states, the trunk's passes, the structure module, the heads."""
