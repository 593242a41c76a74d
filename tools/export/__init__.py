"""Writes usage and credits of an account for other systems: CloudEvents, or FOCUS CSV."""
