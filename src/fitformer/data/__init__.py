"""What can be read, and in which order."""
