"""Tools that make and measure what wangpd ships. Nothing here is imported by the daemon."""
