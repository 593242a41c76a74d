"""The suite's own small language model: its corpus, its training and its one GGUF file.

Nothing here is imported by a service. The training libraries are an optional extra, and the
modules that make the text need only the standard library.
"""
