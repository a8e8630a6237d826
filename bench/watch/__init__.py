"""Runs as they go: read from their folders, shown in the terminal and on a local page."""
