"""Model cards of edits: begin with edits.py."""
