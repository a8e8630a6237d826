"""What models answered before and after unlearning, side by side: the joined table, on the terminal and as a page."""
