"""Times the attention of a model at the sizes of real calls, `dit-accel bench`."""
