"""Robust RFSQ action tokens: trained, calibrated, exported, validated, and decoded on robots."""

__version__ = "0.1.0"
