"""Judges that look at two clips: what they are asked, ours and those of others, and what their answers say."""
