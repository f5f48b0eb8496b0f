"""One click command a file: it parses, calls and prints; what a command does lives elsewhere."""

import os

# torch, when it first allocates, looks whether to ask Linux for huge pages. With them new memory costs
# a fifth of the time, and a candidate of a search on a CPU two thirds.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
