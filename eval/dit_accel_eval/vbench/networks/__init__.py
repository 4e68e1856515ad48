"""Networks of VBench that no library has, and how they are loaded."""
