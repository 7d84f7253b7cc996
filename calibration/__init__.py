"""Fits what deployment needs from data: conditioning constants and recovered decoders."""
