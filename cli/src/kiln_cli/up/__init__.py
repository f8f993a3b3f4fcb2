"""`kiln up`: every service on one machine, without Docker, under one small supervisor."""
