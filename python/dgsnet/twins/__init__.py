"""Twins of real images: what a generator's decoder makes of them, in files that are written as theirs are."""
