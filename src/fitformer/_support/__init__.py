"""What every room may use, each file named for what it does; nothing here knows of models or data."""
