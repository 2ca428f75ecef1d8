"""Named by transformers on import; reading files is not among what the tests need."""
