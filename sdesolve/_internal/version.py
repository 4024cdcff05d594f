"""The version, which the wheel, the site and ``CITATION.cff`` have from here."""

__version__ = "0.1.0"
