"""Models: found by name or folder, or trained here once and kept."""
