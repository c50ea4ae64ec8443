"""Each part run on tiny models, and what to type for what is missing: begin with report.py."""
