"""The client: push, pull and wait, over whatever link reaches the hub."""
