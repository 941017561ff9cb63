"""Research systems that people can actually run: ten published systems behind one command line."""

__version__ = "0.1.0"
