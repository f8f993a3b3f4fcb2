"""The demo model: the script that makes its text, trains it and measures it."""
