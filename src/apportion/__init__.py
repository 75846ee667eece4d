"""Apportion divides one large language model among unequal, low-memory devices."""

__version__ = "0.1.0"
