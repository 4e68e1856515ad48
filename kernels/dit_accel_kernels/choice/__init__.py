"""What "auto" means: candidates that say what they can do, a self check, a race, and a file of what was measured."""
