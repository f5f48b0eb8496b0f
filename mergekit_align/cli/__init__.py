"""One click command a file: it parses, calls and prints; what a command does lives elsewhere."""
