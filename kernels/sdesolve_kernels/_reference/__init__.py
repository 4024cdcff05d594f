"""The ops in plain torch, on any device."""
