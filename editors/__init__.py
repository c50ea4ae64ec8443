"""What edits models. Nothing is here yet."""
