"""What several figures and tables share."""
