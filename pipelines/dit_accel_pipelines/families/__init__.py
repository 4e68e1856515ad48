"""The adapters of model families: one file of data each."""
