"""The report of a suite's results: figures, warnings and pictures, as a page that opens offline or as tables."""
