"""Where tasks run: lanes, each with a Runner."""
