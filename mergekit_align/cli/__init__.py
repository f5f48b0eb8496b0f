"""One click command a file: it parses, calls and prints; what a command does lives elsewhere."""

from mergekit_align.process import set_up

set_up()
