"""The attention plan: token layout, call context, tiles, masks, and the merge verbs by which methods fill it."""
