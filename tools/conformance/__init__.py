"""Shows from outside, as a client would, what a deployment promises."""
