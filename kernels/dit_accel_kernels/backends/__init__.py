"""What executes an attention call; no backend imports a compiler before it is asked for by name or device."""
