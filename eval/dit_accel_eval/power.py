"""How many clips a comparison takes: a verdict's chance, simulated from the differences that clips really show."""
