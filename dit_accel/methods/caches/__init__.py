"""Methods that reuse what an earlier step computed."""
