"""Fuzzers for what comes from outside: targets.py has the functions, run.py `make fuzz`, corpus/ what was found."""
