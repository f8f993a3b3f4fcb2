"""Training data from files, jobs on a server, and watching them."""
