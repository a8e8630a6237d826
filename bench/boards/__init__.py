"""The leaderboard: what is compared with what, who stands where, and the pages that show it."""
