"""Writes usage records of an account for other systems: CloudEvents, or FOCUS CSV."""
