"""Methods that change positions, for videos longer and pictures larger than a model was trained on."""
