"""Single files in the original layout: what they are, and what they call each weight."""
