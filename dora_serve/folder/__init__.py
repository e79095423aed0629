"""What lies in a folder, to which base it belongs, and what it is called."""
