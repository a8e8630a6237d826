"""What a run leaves on disk, and how it is known again: specs, identities, parts, folders, origin."""
