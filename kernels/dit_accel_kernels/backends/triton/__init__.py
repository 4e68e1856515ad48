"""The triton backend: CUDA, ROCm and XPU; importing this folder does not import triton."""
