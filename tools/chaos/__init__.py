"""Kills a whole suite under load, again and again, and then audits every token and every nano."""
