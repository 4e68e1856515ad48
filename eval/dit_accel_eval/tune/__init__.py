"""Searches for settings of methods, `dit-accel tune`."""
