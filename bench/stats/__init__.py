"""Statistics: intervals and tests, and how much of a ranking is the draw of the samples. Pure functions of numbers."""
