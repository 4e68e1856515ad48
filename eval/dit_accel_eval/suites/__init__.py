"""Suites: arms on prompts and seeds of a model, each run held against a converged one or judged by itself."""
