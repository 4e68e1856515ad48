"""Times forwards of models at real sizes with random weights, `dit-accel bench`."""
