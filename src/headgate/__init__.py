"""headgate: serve models and functions behind HTTP and Python handles."""

__version__ = "0.1.0.dev0"
