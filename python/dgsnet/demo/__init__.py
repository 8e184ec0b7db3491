"""Detectors trained and compared on the built-in data."""
