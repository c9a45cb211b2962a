"""Triton kernels of the fast decoder; nothing here imports triton until a CUDA device is used."""
