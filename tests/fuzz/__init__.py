"""Fuzzers of all that strangers hand to dgsnet; `python -m tests.fuzz`, or `make fuzz`."""
