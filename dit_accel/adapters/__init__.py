"""What the core must know of a model family, as data, and where it finds the families that are installed."""
