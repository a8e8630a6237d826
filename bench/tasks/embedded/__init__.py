"""The generated tasks and their vocabularies: they stand without any data."""
