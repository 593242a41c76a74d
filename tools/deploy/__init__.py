"""Looks after what an installation is made of: images, manifests, their secrets."""
