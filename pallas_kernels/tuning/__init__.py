"""Measured configs of the kernels, and the sweep that measures them on a GPU."""
