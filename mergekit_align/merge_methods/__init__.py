"""Our merge methods, one a file."""

# mergekit's own load first, whereupon the plugin registers ours: whichever is imported first.
import mergekit.merge_methods  # noqa: F401
