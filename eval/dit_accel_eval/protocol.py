"""The protocol by which accelerated models are compared, by its version."""

PROTOCOL = "1"
"""Version of the protocol; it rises when the same clips would be measured, paired or judged otherwise."""
