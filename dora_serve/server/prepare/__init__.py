"""What a server needs made before it serves, in a process of its own."""
