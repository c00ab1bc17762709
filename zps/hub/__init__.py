"""The server: one event loop over one ROUTER, and the memory and arithmetic behind it."""
