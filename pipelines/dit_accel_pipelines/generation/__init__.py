"""Generation: from a request to a file of frames."""
