"""Kernels in Triton, one file each. Imported when a call first needs one: ``plm_kernels`` works without Triton."""
