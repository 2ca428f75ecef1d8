"""The HTTP vocabulary that wangpd.py speaks."""
