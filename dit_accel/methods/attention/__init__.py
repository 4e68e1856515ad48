"""Methods that act on attention: one file each."""
