"""Engines carry instructions to clients and bring their answers back. An engine is one function, `exchange`."""
