"""Single files in the original layout: which model they hold, and the names of its weights."""
