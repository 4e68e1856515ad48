"""Rules of the methods as pure functions on numbers: no torch, no model, no state."""
