"""Every part on real input in one page: begin with pages.py, then one section a part."""
