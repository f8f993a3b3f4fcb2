"""The services' log files below a state folder."""
