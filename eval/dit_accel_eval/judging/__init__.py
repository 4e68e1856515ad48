"""Judges that look at two clips: their questions, ours and those of others, and what their answers say."""
