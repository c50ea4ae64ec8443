"""How a model is asked, here or behind an endpoint, and how what it said is kept; begin with ask.py."""
