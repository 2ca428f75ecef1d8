"""Several devices that compute one task together."""
