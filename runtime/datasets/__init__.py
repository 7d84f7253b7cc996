"""Demonstrations of every format, encoded and decoded as a whole."""
