"""Seeing it: histories of what adapting did, the offline report, metrics and the live page."""
