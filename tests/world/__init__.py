"""A small world to try lbagent in: hosts that are network namespaces on one bridge, with real processes.

Shared by the demo, the end-to-end tests and whoever wants to look. Needs root.
"""
