"""The tasks: their order, their states, their journal, and the runner that feeds the workers."""
