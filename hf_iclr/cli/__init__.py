"""The command `hf-iclr`: begin with app.py."""
