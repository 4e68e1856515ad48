"""Doors to servers: plugins of vllm-omni and SGLang, what your own server calls, and a block of modular pipelines."""
