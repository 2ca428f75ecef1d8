"""One job through a loaded pipeline."""
