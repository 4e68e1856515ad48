"""The fa4 backend: FlashAttention-4's block-sparse kernels for exact tiles, ours for pooled ones."""
