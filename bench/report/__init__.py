"""What a person reads: summaries on the terminal and HTML pages."""
