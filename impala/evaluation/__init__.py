"""Test mode, and its report."""
