"""What travels: every message, typed, and the sockets with every option that matters."""
