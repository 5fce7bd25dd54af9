"""Triton kernels, one idea a file, each an operation of ``torch.library``."""
