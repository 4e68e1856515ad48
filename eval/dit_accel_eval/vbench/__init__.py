"""VBench: its sixteen dimensions, its files and its totals, `dit-accel eval vbench`."""
